"""Tests of the rows that show the jobs of run folders, and of the actions on these jobs, without SLURM."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from everest_ds.errors import RunFolderError, UsageError
from everest_ds.jobs.events import JobEvent
from everest_ds.jobs.job_control import restart_jobs, stop_job
from everest_ds.jobs.job_table import find_runs, job_rows
from everest_ds.jobs.resubmit import keep_job, load_job
from everest_ds.jobs.sbatch import BatchJob, JobShape
from everest_ds.jobs.slurm_state import JobState
from everest_ds.jobs.status import LOCAL
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


_HOLD = """
import sys, time
from pathlib import Path
from everest_ds.training.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder._claim()
print("held", flush=True)
time.sleep(60)
"""


def test_a_run_started_by_hand_runs_while_its_folder_is_locked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", steps=3)
    assert find_runs([tmp_path]) == []  # a folder with a config, but without a start
    (run / "environment.json").write_text("{}")
    with subprocess.Popen([sys.executable, "-c", _HOLD, str(run)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        (running,) = job_rows(find_runs([tmp_path]))
        said: list[str] = []
        restart_jobs([running], said.append)
        assert stop_job(running).startswith("saves at its next step") and (run / "kill").exists()
        with pytest.raises(UsageError, match="started without SLURM"):
            stop_job(running, now=True)
        holder.kill()
    (interrupted,) = job_rows([run])
    assert [(row.job_id, row.task, row.status.state) for row in (running, interrupted)] == [
        (LOCAL, "pretrain", "running"),
        (LOCAL, "pretrain", "interrupted"),
    ]
    assert not running.is_over and interrupted.is_over and said == ["local: already runs, without SLURM"]


def test_a_run_of_hand_after_its_jobs_is_a_row_of_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", JobEvent("failed", "7", task="pretrain", code=3))
    (run / "environment.json").write_text("{}")
    assert [row.job_id for row in job_rows([run])] == ["7"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("metrics.jsonl", '{"step": 1, "loss"\n{"step": "x", "loss": 1}\n[1]\n{"step": 3, "loss": 0.5}\n'),
        ("config.yaml", "schedule: [\ntask: pretrain\n"),
        ("config.yaml", "schedule: {epochs: many}\nrun: 3\n"),
        (
            "jobs.jsonl",
            '{"event": "started", "job_id": 7}\n{"event": "started", "job_id": "7", "seconds": "x"}\n',
        ),
    ],
)
def test_a_damaged_run_spoils_no_listing(tmp_path: Path, file: str, text: str) -> None:
    runs = [make_run(tmp_path / name, JobEvent("started", "7", task="pretrain"), steps=3) for name in "ab"]
    for run in runs:
        (run / "environment.json").write_text("{}")
    (runs[0] / file).write_text(text)
    rows = job_rows(find_runs([tmp_path]))
    assert [row.run for row in rows] == runs and rows[1].progress.share == 3 / 9


@pytest.mark.parametrize("limit", ["null", "4"])
def test_a_run_ends_at_its_step_limit(tmp_path: Path, limit: str) -> None:
    run = make_run(tmp_path / "a", steps=4)
    (run / "environment.json").write_text("{}")
    (run / "config.yaml").write_text(f"task: pretrain\nschedule:\n  epochs: 3\nrun:\n  max_steps: {limit}\n")
    (row,) = job_rows([run])
    assert row.status.state == ("interrupted" if limit == "null" else "finished")


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


def test_the_record_of_another_user_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = BatchJob(Path("x.sbatch"), ("a.yaml",), "name", JobShape(), options=("--qos=high",))
    keep_job(tmp_path, "pretrain", job)
    assert load_job(tmp_path, "pretrain") == (job, Path.cwd())
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(RunFolderError, match="belongs to another user.*fix: .*everest-ds submit pretrain"):
        load_job(tmp_path, "pretrain")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"folder": 3}', '{"folder": "/", "script": "x"}'])
def test_a_damaged_record_of_a_job_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "submit-pretrain.json").write_text(text)
    with pytest.raises(RunFolderError, match="no readable record"):
        load_job(tmp_path, "pretrain")
