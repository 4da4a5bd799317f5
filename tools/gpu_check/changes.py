"""The gain of each change to the engine: the same step with changes undone one by one.

Some changes are not an option of a run, because no run should train without them; this module undoes them by
patching.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

from everest_ds.config.zero_settings import ZeroSettings
from everest_ds.parallel import lean_update
from everest_ds.parallel.world_of_one import world_of_one
from everest_ds.shipped import shipped
from gpu_check.cases import Case
from gpu_check.prefetch import measure_prefetch
from gpu_check.record import Record
from gpu_check.steps import measure_case

# ViT-L pre-training is measured on every rung; the other cases, on the rungs that matter most to them.
_TIMERS, _REDUCTION, _UPDATE, _COMPILE = "timers off", "nothing reduced on one rank", "lean update", "compile"
_ALL = (_TIMERS, _REDUCTION, _UPDATE, _COMPILE)


class Rung(NamedTuple):
    """A case with the changes that are in force: the first few of `_ALL`."""

    case: Case
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the title of the row."""
        rung = f"up to {self.changes[-1]}" if self.changes else "unchanged DeepSpeed, eager"
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
    """Measure every rung, and the time saved by preparing the next batch during the step."""
    timed = _with_timers(record.session.out)
    try:
        with world_of_one() as world:
            # A rehearsal leaves compilation out, because it takes minutes on a CPU.
            for rung in _ONE_LADDER[:-1] if record.session.tiny else LADDERS:
                with _only(rung.changes):
                    measure_case(record, _case(rung, timed), world, name=rung.name)
            for case in (_FINE_TUNING, _LARGE):
                config = case.config(record.session.tiny)
                name = f"{case.name}, next batch prepared in line and during the step"
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
    """Undo every change that is not among `changes` and is not a setting of a run."""
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
    """Write the shipped ZeRO-2 file with timers that wait for the device, and return its path."""
    tree = json.loads((shipped("ds_configs") / "zero2.json").read_text())
    file = folder / "zero2_with_timers.json"
    file.write_text(json.dumps({**tree, "timers": {"throughput": {"enabled": True}}}))
    return file.resolve()
