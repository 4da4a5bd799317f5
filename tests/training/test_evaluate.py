"""Tests of evaluation: its metrics, its files, and equal results on any number of ranks."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from everest_ds.config import Experiment
from everest_ds.data import loader
from everest_ds.data.clip_source import LoadedItem
from everest_ds.data.clips import EvaluationClips
from everest_ds.errors import DataError, EverestError, ExitCode
from everest_ds.parallel.world import World
from everest_ds.training.evaluate import Evaluation, run_test
from everest_ds.training.loop import train
from tests.ranks import run_ranks
from tests.training.runs import experiment, metrics, train_rank


def test_metrics_follow_their_definitions() -> None:
    probabilities = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.2, 0.2, 0.6]], np.float32)
    outcome = Evaluation(probabilities, np.array([0, 1, 1, 2]))
    assert outcome.top(1) == 50.0
    assert outcome.top(2) == 100.0
    assert outcome.top5 is None  # of three classes, any answer would count
    assert outcome.loss == pytest.approx(-np.log([0.5, 0.2, 0.3, 0.6]).mean())
    assert outcome.confusion().tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 1]]


def evaluate_rank(world: World, config: Experiment) -> dict[str, object]:
    return run_test(config, world)


def train_and_test(world: World, config: Experiment) -> dict[str, object]:
    train(config, world)
    return run_test(config, world)


def test_fine_tuning_starts_from_pre_training_validates_and_tests(motion_data: Path, tmp_path: Path) -> None:
    run_ranks(train_rank, 2, experiment(motion_data, tmp_path / "pre"))
    config = experiment(
        motion_data,
        tmp_path / "fine",
        "finetune",
        model={"init_from": str(tmp_path / "pre")},
        batch={"micro_batch_size": 5, "global_batch_size": 10},
        parallelism={"zero_stage": 3},
    )
    on_two = run_ranks(train_and_test, 2, config)[0]
    assert run_ranks(evaluate_rank, 1, config)[0] == on_two
    assert run_ranks(evaluate_rank, 3, config)[0] == on_two
    assert json.loads((tmp_path / "fine" / "evaluation.json").read_text()) == on_two
    assert (tmp_path / "fine" / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert on_two["top1"] <= on_two["top5"] <= 100
    assert on_two["num_clips"] == 12 and [row["clips"] for row in on_two["classes"]] == [2] * 6
    validations = [row["val_top1"] for row in metrics(tmp_path / "fine") if "val_top1" in row]
    assert len(validations) == 3
    log = (tmp_path / "fine" / "logs" / "rank-0.log").read_text()
    assert f"encoder weights from {tmp_path / 'pre' / 'checkpoints' / 'step-00000009'}" in log
    assert (tmp_path / "fine" / "best.safetensors").is_file()


def evaluate_with_a_failing_rank(world: World, config: Experiment) -> str:
    """Evaluate with a failing loader on rank 1, and return the error that ends the evaluation here."""
    if world.rank == 1:
        EvaluationClips.__getitem__ = fail  # type: ignore[method-assign]
    try:
        run_test(config, world)
    except EverestError as error:
        return str(error)
    return "done"


def fail(clips: EvaluationClips, items: Sequence[int]) -> LoadedItem:
    raise RuntimeError("simulated failure")


def test_a_loader_that_fails_ends_evaluation_on_every_rank(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(
        motion_data, tmp_path, "finetune", data={"num_workers": 0}, schedule={"epochs": 1, "warmup_epochs": 0}
    )
    run_ranks(train_rank, 1, config)
    for text in run_ranks(evaluate_with_a_failing_rank, 2, config):
        assert "a loader worker failed; given: RuntimeError: simulated failure" in text


def killed_on_rank_1(
    world: World, config: Experiment, act: Callable[[Experiment, World], object]
) -> DataError:
    """Run `act` with evaluation workers that are killed on rank 1; return the error that ends it here."""
    loader._POLL_S = 0.3
    if world.rank == 1:
        EvaluationClips.__getitem__ = kill_worker  # type: ignore[method-assign]
    with pytest.raises(DataError) as caught:
        act(config, world)
    return caught.value


def kill_worker(clips: EvaluationClips, items: Sequence[int]) -> LoadedItem:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "tensor"), [(train, 1), (train, 2), (run_test, 1)], ids=["validation", "in a group", "test"]
)
def test_killed_workers_end_evaluation_on_every_rank(
    act: Callable[[Experiment, World], object], tensor: int, motion_data: Path, tmp_path: Path
) -> None:
    """No rank waits for the one whose workers are gone, and all report the same reason and exit code."""
    config = experiment(
        motion_data,
        tmp_path,
        "finetune",
        data={"num_workers": 2},
        parallelism={"tensor": tensor},
        schedule={"epochs": 1, "warmup_epochs": 0},
    )
    if act is run_test:
        run_ranks(train_rank, 1, config)
    # A rank that waits is lost after these 20 seconds, with another error.
    for error in run_ranks(killed_on_rank_1, 2, config, act, patience_s=20):
        assert error.exit_code == ExitCode.DATA
        assert "the loader's workers are killed again and again; given: SIGKILL" in str(error)
