"""Tests of `everest-ds submit --local`: the jobs of a submission, one after another on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from everest_ds.config import dump_experiment
from everest_ds.errors import ExitCode
from everest_ds.jobs.events import read_events
from tests.training.runs import experiment

pytestmark = pytest.mark.slow


def submit_locally(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `everest-ds submit --local` in a folder, with one rank on the CPU."""
    return subprocess.run(
        [sys.executable, "-m", "everest_ds", "submit", *words, "--local", "--ntasks-per-node=1"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_a_chain_reports_the_figures_of_a_test_that_lacks_videos(motion_data: Path, tmp_path: Path) -> None:
    present = (motion_data / "test.txt").read_text().splitlines()[:3]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "test.txt").write_text(
        "\n".join([*(str(motion_data / line) for line in present), f"{tmp_path}/broken.mp4 0\n"])
    )
    for task in ("pretrain", "finetune"):
        config = experiment(motion_data, tmp_path / f"{task}-run", task, data={"test": "test.txt"})
        (tmp_path / f"{task}.yaml").write_text(dump_experiment(config))
    done = submit_locally(tmp_path, "chain", "pretrain.yaml", "finetune.yaml", "run.max_steps=1")
    assert done.returncode == ExitCode.DATA, done.stdout + done.stderr
    tuned = tmp_path / "finetune-run"
    ended = [event for event in read_events(tuned) if event.event in ("finished", "failed")]
    assert [(event.task, event.event) for event in ended] == [
        ("finetune", "finished"),
        ("evaluate", "failed"),
        ("report", "finished"),
    ]
    assert json.loads((tuned / "evaluation.json").read_text())["num_missing"] == 1
    assert (tuned / "report" / "report.html").is_file()


def test_a_chain_ends_at_a_training_that_fails(motion_data: Path, tmp_path: Path) -> None:
    for task in ("pretrain", "finetune"):
        schedule = {"base_lr": 1e30, "warmup_epochs": 0}
        config = experiment(motion_data, tmp_path / f"{task}-run", task, schedule=schedule)
        (tmp_path / f"{task}.yaml").write_text(dump_experiment(config))
    done = submit_locally(tmp_path, "chain", "pretrain.yaml", "finetune.yaml")
    assert done.returncode == ExitCode.DIVERGED, done.stdout + done.stderr
    assert [event.event for event in read_events(tmp_path / "pretrain-run")] == ["started", "failed"]
    assert not read_events(tmp_path / "finetune-run")
