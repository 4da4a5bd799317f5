"""Tests of `everest-ds jobs | logs | cancel | requeue | sweep` on run folders, without SLURM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everest_ds.errors import ExitCode
from everest_ds.jobs.events import JobEvent
from everest_ds.jobs.status import LOCAL
from everest_ds.jobs.sweep_file import SWEEP_FILE, SweepCandidate, write_candidates
from tests.cli.test_cli import run_main
from tests.jobs.job_runs import make_run


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide any SLURM installation of this machine."""
    monkeypatch.setenv("PATH", "/nowhere")


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
