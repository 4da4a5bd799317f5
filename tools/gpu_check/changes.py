"""Gain of each change of the engine: the same step with changes taken back one by one.

Some of them are no option of a run, since nobody should train without them. Those are taken back by patching
in this process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from everest_ds.cli.alone import world_of_one
from everest_ds.config.zero_settings import ZeroSettings
from everest_ds.parallel import lean_update
from everest_ds.shipped import shipped
from gpu_check.cases import Case
from gpu_check.prefetch import measure_prefetch
from gpu_check.record import Record
from gpu_check.steps import measure_case

# ViT-L pre-training has every rung of the ladder, the others those that matter most to them.
_TIMERS, _REDUCTION, _UPDATE, _COMPILE = "timers off", "nothing reduced on one rank", "lean update", "compile"
_ALL = (_TIMERS, _REDUCTION, _UPDATE, _COMPILE)


class Rung(NamedTuple):
    """A case, and the first changes of `_ALL`, which are in force."""

    case: Case
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        """The title of its row."""
        rung = f"up to {self.changes[-1]}" if self.changes else "DeepSpeed as it comes, eager"
        return f"{self.case.name}, {rung}"


_LARGE, _FINE_TUNING = Case("pretrain", "vit_large", 64), Case("finetune", "vit_large", 16)
_BASE = Case("pretrain", "vit_base", 64)
_ONE_LADDER = tuple(Rung(_LARGE, _ALL[:count]) for count in range(len(_ALL) + 1))
LADDERS = (
    *_ONE_LADDER,
    Rung(_FINE_TUNING, ()),
    Rung(_FINE_TUNING, _ALL[:-1]),
    Rung(_FINE_TUNING, _ALL),
    Rung(_FINE_TUNING._replace(overrides=("recompute.mode=gelu",)), _ALL),
    Rung(_BASE, ()),
    Rung(_BASE, _ALL[:-1]),
    Rung(_BASE, _ALL),
    Rung(_LARGE._replace(overrides=("recompute.mode=gelu",)), _ALL),
)


def run(record: Record) -> None:
    """Measure every rung, and what preparing the next batch beside the step saves."""
    timed = _with_timers(record.session.out)
    try:
        with world_of_one() as world:
            # a rehearsal compiles nothing: for a CPU, that takes minutes
            for rung in _ONE_LADDER[:-1] if record.session.tiny else LADDERS:
                with _only(rung.changes):
                    measure_case(record, _case(rung, timed), world, name=rung.name)
            for case in (_FINE_TUNING, _LARGE):
                config = case.config(record.session.tiny)
                name = f"{case.name}, the next batch in line and beside the step"
                record.measure(name, partial(measure_prefetch, config, world), needs_s=10)
    finally:
        timed.unlink()


def _case(rung: Rung, timed: Path) -> Case:
    overrides = [f"model.compile={str(_COMPILE in rung.changes).lower()}"]
    if _TIMERS not in rung.changes:
        overrides += ["parallelism.zero_stage=2", f"parallelism.ds_config={timed}"]
    return rung.case._replace(overrides=(*rung.case.overrides, *overrides))


@contextmanager
def _only(changes: tuple[str, ...]) -> Iterator[None]:
    """Take back the changes that are not among `changes` and are no setting of a run."""
    with ExitStack() as stack:
        for change, undo in _UNDOING.items():
            if change not in changes:
                stack.enter_context(undo())
        yield


_UNDOING: dict[str, Callable[[], AbstractContextManager[object]]] = {
    _REDUCTION: lambda: patch.object(ZeroSettings, "shards_nothing", lambda *_: False),
    _UPDATE: lambda: patch.object(lean_update, "make_lean", lambda *_: None),
}


def _with_timers(folder: Path) -> Path:
    """A DeepSpeed file like the shipped one of ZeRO-2, with the timers that wait for the device."""
    tree = json.loads((shipped("ds_configs") / "zero2.json").read_text())
    file = folder / "zero2_with_timers.json"
    file.write_text(json.dumps({**tree, "timers": {"throughput": {"enabled": True}}}))
    return file.resolve()
