"""Tests of `everest-ds jobs | logs | cancel | requeue | sweep` on run folders, without SLURM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everest_ds.cli.logs import Tails
from everest_ds.config import dump_experiment
from everest_ds.errors import ExitCode
from everest_ds.jobs.events import JobEvent, append_event
from everest_ds.jobs.job_table import find_runs, job_rows
from everest_ds.jobs.status import LOCAL
from everest_ds.jobs.sweep_file import SWEEP_FILE, SweepCandidate, write_candidates
from tests.cli.test_cli import run_main
from tests.training.runs import experiment


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide any SLURM installation of this machine."""
    monkeypatch.setenv("PATH", "/nowhere")


def make_run(folder: Path, *events: JobEvent, steps: int = 0) -> Path:
    folder.mkdir(parents=True)
    for event in events:
        append_event(folder, event)
    (folder / "config.yaml").write_text(dump_experiment(experiment(Path("data"), folder)))
    rows = [
        {"step": n, "epoch": n / 3, "loss": 1 / n, "clips_per_s": 5.0, "memory_bytes": 2**30}
        for n in range(1, steps + 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"step": 9')
    return folder


def test_jobs_are_found_and_their_progress_is_of_the_whole_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a" / "it's [b]", JobEvent("submitted", "7", task="pretrain"), steps=6)
    (row,) = job_rows(find_runs([tmp_path]))
    assert row.run == run and row.progress.share == 6 / 9 and row.verdict.state == "forgotten"
    assert "'\"'\"'" in row.verdict.next  # the apostrophe of the name, quoted for a shell


def test_of_each_task_of_a_run_the_last_job_is_shown(tmp_path: Path) -> None:
    tasks = [("1", "finetune"), ("2", "finetune"), ("3", "evaluate")]
    make_run(tmp_path / "a", *(JobEvent("submitted", job, task=task) for job, task in tasks))
    assert [row.job_id for row in job_rows(find_runs([tmp_path]))] == ["2", "3"]


def test_the_table_and_its_json_agree(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    started = JobEvent("started", LOCAL, task="pretrain")
    failed = JobEvent("failed", LOCAL, reason="[rank 1] memory is full", code=7, task="pretrain")
    make_run(tmp_path / "a", started, failed, steps=3)
    assert run_main(monkeypatch, "jobs", str(tmp_path), "--json", str(tmp_path / "jobs.json")) == 0
    (row,) = json.loads((tmp_path / "jobs.json").read_text())
    printed = capsys.readouterr().out
    assert row["state"] == "out of memory" and row["progress"]["step"] == 3
    assert "out of memory" in printed and "[rank 1] memory is full" in printed and "3 of 9" in printed


def test_out_of_memory_is_a_row_of_a_sweeps_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = JobEvent("finished", LOCAL, task="pretrain")
    full = JobEvent("failed", LOCAL, task="pretrain", code=ExitCode.OUT_OF_MEMORY, reason="full")
    make_run(tmp_path / "000", done, steps=9)
    make_run(tmp_path / "001", full)
    settings = [("a=1",), ("a=2",), ("b=3",)]
    candidates = [SweepCandidate(f"00{n}", "pretrain", "r", texts, ()) for n, texts in enumerate(settings)]
    write_candidates(tmp_path / SWEEP_FILE, candidates)
    file = tmp_path / "rows.csv"
    assert run_main(monkeypatch, "sweep", str(tmp_path), "--csv", str(file)) == 0
    lines = [line.split(",") for line in file.read_text().splitlines()]
    assert lines[0][:4] == ["run", "a", "b", "state"]
    assert [line[1:4] for line in lines[1:]] == [
        ["1", "", "finished"],
        ["2", "", "out of memory"],
        ["", "3", "not submitted"],
    ]


@pytest.mark.parametrize("command", ["logs", "cancel", "requeue"])
def test_a_run_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run_main(monkeypatch, command, "no/such/run") == 2
    assert "no such run or job; given: 'no/such/run'" in capsys.readouterr().err


def test_logs_of_all_ranks_are_merged_by_time_and_followed(tmp_path: Path) -> None:
    (tmp_path / "rank-0.log").write_text("2026-01-01 00:00:00,000 a\n2026-01-01 00:00:02,000 c\n trace\nhalf")
    (tmp_path / "rank-1.log").write_text("2026-01-01 00:00:01,000 b\n")
    tails = Tails(tmp_path, "rank-*.log")
    assert [line[-8:].split()[-1] for line in tails.last(3)] == ["b", "c", "trace"]
    with open(tmp_path / "rank-0.log", "a") as stream:
        stream.write(" done\n")
    (tmp_path / "rank-2.log").write_text("new\n")
    assert tails.new() == ["[rank-0] half done", "[rank-2] new"]
    assert tails.new() == []
