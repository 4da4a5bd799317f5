"""Tests of reported step times: they include late work of the device, and nothing but steps."""

from __future__ import annotations

import time
import traceback
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from everest_ds.config import Experiment
from everest_ds.parallel.world import World
from everest_ds.training import loop
from everest_ds.training.loop import train
from everest_ds.training.saver import Saver
from tests.ranks import run_ranks
from tests.training.faults import before, replaced
from tests.training.runs import experiment, metrics

_SLOW_S = 5.0  # longer than any step of these runs, even on a busy machine
_EPOCH = {"epochs": 1, "warmup_epochs": 0}
_AUGMENT = {
    "rand_augment_ops": 4,
    "erase_probability": 0.9,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
}


_PARTS = {"save": Saver, "evaluate_views": loop, "draw_pictures": loop, "mean": World}


def train_slowly(world: World, config: Experiment, *slow: str) -> None:
    """Train with a delay in the second call of each of the `slow` functions."""
    with ExitStack() as patches:
        for name in slow:
            sleep = before(lambda: time.sleep(_SLOW_S), call=2)
            patches.enter_context(replaced(_PARTS[name], name, sleep))
        train(config, world)


def seconds_of_steps(config: Experiment, run: Path) -> dict[int, float]:
    """Return the seconds per step, by step, as the metrics file reports them."""
    rows = [row for row in metrics(run) if "clips_per_s" in row]
    return {row["step"]: (config.batch.global_batch_size or 0) / row["clips_per_s"] for row in rows}


@pytest.mark.slow
def test_saving_validation_and_pictures_are_no_steps(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(
        motion_data,
        tmp_path,
        "finetune",
        data={"num_workers": 0},
        schedule={"epochs": 3, "warmup_epochs": 0},
        batch={"micro_batch_size": 8, "global_batch_size": 24},
        run={"save_every_steps": 1, "image_every_steps": 1},
    )
    run_ranks(train_slowly, 1, config, "save", "evaluate_views", "draw_pictures")
    seconds = seconds_of_steps(config, tmp_path)
    assert len(seconds) == 3 and max(seconds.values()) < _SLOW_S


def test_what_the_report_waits_for_is_part_of_the_steps(motion_data: Path, tmp_path: Path) -> None:
    """Work that a device, such as a GPU, finishes after the last launch counts as part of the steps."""
    config = experiment(
        motion_data, tmp_path, data={"num_workers": 0}, schedule=_EPOCH, batch={"micro_batch_size": 8}
    )
    run_ranks(train_slowly, 1, config, "mean")
    seconds = seconds_of_steps(config, tmp_path)
    assert seconds[1] < _SLOW_S <= seconds[2]


class HostWaits(TorchDispatchMode):
    """A counter of host reads of tensor values, by the EVEREST-DS or DeepSpeed function that reads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ == "_local_scalar_dense":
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            place = Path(frames[-1].filename)
            self.found[f"{place.parts[-2]}/{place.stem}.{frames[-1].name}"] += 1
        return func(*args, **(kwargs or {}))


def waits_of_steps(world: World, config: Experiment) -> list[Counter[str]]:
    """Train, and return the counted host waits of each training step."""
    counts = []

    def counting(train_step: Any) -> Any:
        def step(run: Any, *args: Any) -> Any:
            with HostWaits() as waits:
                loss = train_step(run, *args)
            counts.append(waits.found)
            return loss

        return step

    with replaced(loop.TrainingRun, "_train_step", counting):
        train(config, world)
    return counts


def test_a_step_waits_for_the_device_once(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(
        motion_data, tmp_path, "finetune", data={"num_workers": 0}, schedule=_EPOCH, augment=_AUGMENT
    )
    config = config.model_copy(update={"precision": "bf16"})
    _, counts, _ = run_ranks(waits_of_steps, 1, config)[0]
    # The device is read once, for the norm of the gradients. The two other reads are messages between hosts,
    # one for each micro-batch.
    assert counts == {"parallel/lean_update._scaled_norm": 1, "parallel/world.greatest": 2}
