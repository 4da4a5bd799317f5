"""Tests of the rows that show the jobs of run folders, and of the actions on these jobs, without SLURM."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from everest_ds.jobs.events import JobEvent
from everest_ds.jobs.job_control import restart_jobs, stop_job
from everest_ds.jobs.job_table import find_runs, job_rows
from everest_ds.jobs.slurm_state import JobState
from tests.jobs.job_runs import make_run


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide any SLURM installation of this machine."""
    monkeypatch.setenv("PATH", "/nowhere")


def test_jobs_are_found_and_their_progress_is_of_the_whole_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a" / "it's [b]", JobEvent("submitted", "7", task="pretrain"), steps=6)
    (row,) = job_rows(find_runs([tmp_path]))
    assert row.run == run and row.progress.share == 6 / 9 and row.status.state == "forgotten"
    assert "'\"'\"'" in row.status.next  # the apostrophe of the name, quoted for a shell


def test_the_last_job_of_each_task_of_a_run_is_shown(tmp_path: Path) -> None:
    tasks = [("1", "finetune"), ("2", "finetune"), ("3", "evaluate")]
    make_run(tmp_path / "a", *(JobEvent("submitted", job, task=task) for job, task in tasks))
    assert [row.job_id for row in job_rows(find_runs([tmp_path]))] == ["2", "3"]


def test_a_running_job_is_stopped_by_a_file_that_its_restart_removes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", JobEvent("started", "7", task="pretrain"))
    (ended,) = job_rows([run])
    assert stop_job(ended) == "has already ended: forgotten" and not (run / "kill").exists()
    assert stop_job(replace(ended, slurm=JobState("7", "7", "RUNNING"))).startswith("saves at its next step")
    assert (run / "kill").exists()
    waiting = replace(ended, slurm=JobState("7", "7", "PENDING"))
    said: list[str] = []
    restart_jobs([waiting], said.append)
    assert said == ["7: already waits in the queue"]
    assert not (run / "kill").exists()
