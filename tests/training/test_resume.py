"""Tests of resuming: a stopped run continues as if it had not been stopped, bit-exact on a CPU."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from everest_ds.checkpoints.names import list_checkpoints
from everest_ds.config import Experiment
from everest_ds.errors import CheckpointError, StoppedError
from everest_ds.parallel.world import World
from everest_ds.training.loop import TrainingRun, train
from tests.ranks import run_ranks
from tests.training.runs import experiment, losses, metrics, train_rank


class _Signalling:
    """A context that sends this process a real signal when it reports a given step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number, self.report = step, number, TrainingRun._report

    def __enter__(self) -> None:
        def report_and_signal(run: TrainingRun, loss: Tensor) -> None:
            self.report(run, loss)
            if run.step == self.step:
                os.kill(os.getpid(), self.number)

        TrainingRun._report = report_and_signal  # type: ignore[assignment, method-assign]

    def __exit__(self, *_: object) -> None:
        TrainingRun._report = self.report  # type: ignore[method-assign]


def stop_and_resume(world: World, config: Experiment, stop_at: int) -> str:
    """Train, stopped by a signal to the last rank at step `stop_at`, and then start the same run again."""
    message = "did not stop"
    number = (signal.SIGTERM, signal.SIGUSR1)[stop_at % 2]
    try:
        if world.rank == world.size - 1:
            with _Signalling(stop_at, number):
                train(config, world)
        else:
            train(config, world)
    except StoppedError as error:
        message = str(error)
    train(config, world)
    return message


def stop_after(world: World, config: Experiment, step: int) -> None:
    """Train until `step`, save and stop."""
    with _Signalling(step, signal.SIGTERM), contextlib.suppress(StoppedError):
        train(config, world)


@pytest.mark.parametrize(
    "stage, stop_at",
    [(2, 5), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((0, 4), (1, 2), (3, 3)))],
)
def test_a_stopped_run_resumes_bit_for_bit(
    motion_data: Path, tmp_path: Path, stage: int, stop_at: int
) -> None:
    whole = experiment(motion_data, tmp_path / "whole", parallelism={"zero_stage": stage})
    parts = experiment(motion_data, tmp_path / "parts", parallelism={"zero_stage": stage})
    run_ranks(train_rank, 2, whole)
    messages = run_ranks(stop_and_resume, 2, parts, stop_at)
    assert all(f"stopped after step {stop_at} of 9" in message for message in messages)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert list(losses(tmp_path / "whole")) == list(range(1, 10))


def train_up_to(world: World, config: Experiment, ends: list[int | None]) -> list[tuple[bool, int]]:
    """Start a run with each `run.max_steps`; return whether it is whole then, and its saved step."""
    found = []
    for end in ends:
        limited = config.model_copy(update={"run": config.run.model_copy(update={"max_steps": end})})
        whole = train(limited, world)
        found.append((whole, int(list_checkpoints(config.run.dir / "checkpoints")[-1].name.split("-")[1])))
    return found


def test_max_steps_ends_a_run_early_on_the_schedule_of_the_whole_run(
    motion_data: Path, tmp_path: Path
) -> None:
    whole = experiment(motion_data, tmp_path / "whole", "finetune")
    parts = experiment(motion_data, tmp_path / "parts", "finetune")
    run_ranks(train_rank, 1, whole)
    # Raised, lowered below the steps that are done, raised beyond the schedule, and removed.
    (found,) = run_ranks(train_up_to, 1, parts, [2, 5, 4, 50, None])
    assert found == [(False, 2), (False, 5), (False, 5), (True, 9), (True, 9)]
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    rates = [
        {row["step"]: row["lr"] for row in metrics(tmp_path / name) if "lr" in row}
        for name in ("parts", "whole")
    ]
    assert rates[0] == rates[1]
    assert {2, 5} <= {row["step"] for row in metrics(tmp_path / "parts") if "val_loss" in row}


def crash_after(world: World, config: Experiment, step: int) -> None:
    """Train until rank 0 is killed at `step` without warning, as by a power cut."""
    if world.rank == 0:
        with _Signalling(step, signal.SIGKILL):
            train(config, world)
    else:
        train(config, world)


def test_a_killed_finetuning_goes_on_from_its_last_checkpoint(motion_data: Path, tmp_path: Path) -> None:
    often = {"save_every_steps": 4}
    whole = experiment(motion_data, tmp_path / "whole", "finetune", run=often)
    parts = experiment(motion_data, tmp_path / "parts", "finetune", run=often)
    run_ranks(train_rank, 1, whole)
    with pytest.raises(AssertionError, match="rank 0 died"):
        run_ranks(crash_after, 1, parts, 6)
    run_ranks(train_rank, 1, parts)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def resume_error(world: World, config: Experiment) -> str:
    try:
        train(config, world)
    except CheckpointError as error:
        return str(error)
    return "no error"


def test_another_global_batch_is_refused_by_name(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(
        motion_data, tmp_path, schedule={"epochs": 1, "warmup_epochs": 0}, batch={"global_batch_size": None}
    )
    run_ranks(train_rank, 2, config)
    (message,) = run_ranks(resume_error, 1, config)
    assert "saved with another global batch; given: 4 clips" in message
    assert "allowed: 8 clips; fix: set batch.global_batch_size=8" in message


Place = tuple[int, int, int]  # ranks, ZeRO stage, tensor degree


@pytest.mark.parametrize(
    "path",
    [
        ((2, 1, 1), (1, 3, 1)),
        pytest.param(((4, 2, 1), (2, 3, 2), (1, 2, 1), (4, 0, 1)), marks=pytest.mark.slow),
        pytest.param(((1, 0, 1), (2, 2, 2), (2, 3, 1), (4, 2, 2)), marks=pytest.mark.slow),
    ],
    ids=lambda path: "-".join(f"{ranks}x{stage}x{tensor}" for ranks, stage, tensor in path),
)
@pytest.mark.parametrize("task", ["finetune", pytest.param("pretrain", marks=pytest.mark.slow)])
def test_a_run_moves_to_other_ranks_zero_stages_and_tensor_degrees(
    motion_data: Path, tmp_path: Path, task: str, path: tuple[Place, ...]
) -> None:
    """A run that resumes on other ranks, stages and degrees has the losses of a run that never stopped."""
    options: dict[str, Any] = {"batch": {"micro_batch_size": 2}, "optimizer": {"layer_decay": 0.8}}
    run_ranks(train_rank, 1, experiment(motion_data, tmp_path / "whole", task, **options))
    for leg, (num_ranks, stage, tensor) in enumerate(path, 1):
        here = {"zero_stage": stage, "tensor": tensor}
        config = experiment(motion_data, tmp_path / "moved", task, **options, parallelism=here)
        if leg < len(path):
            run_ranks(stop_after, num_ranks, config, 2 * leg)
        else:
            run_ranks(train_rank, num_ranks, config)
    whole, moved = losses(tmp_path / "whole"), losses(tmp_path / "moved")
    assert list(moved) == list(range(1, 10))
    assert moved == pytest.approx(whole, rel=1e-5)
