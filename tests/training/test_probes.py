"""Tests of the probes during pre-training: equal on any number of ranks, resumable, and without effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from everest_ds.config import Experiment
from everest_ds.errors import DataError
from everest_ds.training.input_files import check_evaluation_inputs, splits_of
from tests.ranks import run_ranks
from tests.training.runs import experiment, losses, metrics, train_rank
from tests.training.test_observers import scalars

FIGURES = ("step", "probe_linear_top1", "probe_knn_top1", "probe_rankme", "probe_missing")


def probed(data: Path, folder: Path, /, **sections: dict[str, Any]) -> Experiment:
    """Return a run of 6 steps that probes its encoder after every second step."""
    sets = {"probe_train": str(data / "train.txt"), "probe_test": str(data / "test.txt"), "num_workers": 0}
    run = {"probe_every_steps": 2, **sections.pop("run", {})}
    return experiment(
        data,
        folder,
        **{
            "schedule": {"epochs": 2, "warmup_epochs": 1, "base_lr": 0.02},
            "run": {**run, "dir": str(folder), "log_every_steps": 1, "image_every_steps": 100},
            **sections,
            "data": {**sets, **sections.get("data", {})},
        },
    )


def probes(run: Path) -> list[tuple[float, ...]]:
    return [tuple(row[name] for name in FIGURES) for row in metrics(run) if "probe_rankme" in row]


def test_two_ranks_report_the_figures_of_one(motion_data: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "train.txt"  # with a video that cannot be read
    lines = [f"{motion_data}/{line}\n" for line in (motion_data / "train.txt").read_text().splitlines()]
    manifest.write_text("".join([f"{tmp_path}/gone.mp4 1\n", *lines]))
    sections: dict[str, Any] = {
        "data": {"probe_train": str(manifest)},
        "schedule": {"epochs": 1, "warmup_epochs": 0},
    }
    for ranks in (1, 2):
        run_ranks(train_rank, ranks, probed(motion_data, tmp_path / str(ranks), **sections))
    one, two = (probes(tmp_path / str(ranks)) for ranks in (1, 2))
    assert one == two and [row[0] for row in one] == [2, 3]
    assert all(0 <= row[1] <= 100 and 1 < row[3] < 24 and row[4] == 1 for row in one)
    shown = scalars(tmp_path / "2" / "tensorboard")
    assert shown["probe/probe_rankme"] == pytest.approx(one[0][3])


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallelism", [{"zero_stage": 1}, {"zero_stage": 3}, {"zero_stage": 1, "tensor": 2}], ids=str
)
def test_a_run_with_probes_trains_as_without_and_resumes_them(
    motion_data: Path, tmp_path: Path, parallelism: dict[str, Any]
) -> None:
    more = {"parallelism": parallelism}
    whole = probed(motion_data, tmp_path / "whole", **more)
    run_ranks(train_rank, 2, whole)
    run_ranks(train_rank, 2, probed(motion_data, tmp_path / "bare", run={"probe_every_steps": None}, **more))
    assert losses(tmp_path / "whole") == losses(tmp_path / "bare") and len(losses(tmp_path / "bare")) == 6
    for last in (3, 4, None):  # the second start ends with a probe, which the third must not repeat
        run = {"max_steps": last, "probe_every_steps": 2}
        run_ranks(train_rank, 2, probed(motion_data, tmp_path / "parts", run=run, **more))
    rows = {row[0]: row for row in probes(tmp_path / "parts")}
    assert list(rows) == [row[0] for row in probes(tmp_path / "parts")] == [2, 3, 4, 6]
    assert [rows[step] for step in (2, 4, 6)] == probes(tmp_path / "whole")


def test_settings_of_probes_that_cannot_work_are_refused(motion_data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="data.probe_train is not"):
        probed(motion_data, tmp_path, data={"probe_train": None})
    with pytest.raises(ValidationError, match="set data.val to validate the classifier"):
        experiment(motion_data, tmp_path, "finetune", run={"probe_every_steps": 2})
    unlabelled = tmp_path / "list.txt"
    unlabelled.write_text("a.mp4\n")
    config = probed(motion_data, tmp_path, data={"probe_test": str(unlabelled)})
    assert splits_of("pretrain", config) == ["train", "probe_train", "probe_test"]
    with pytest.raises(DataError, match="list.txt:1: no label"):
        check_evaluation_inputs(config)
    off = probed(motion_data, tmp_path, run={"probe_every_steps": None})
    assert splits_of("pretrain", off) == ["train"]
