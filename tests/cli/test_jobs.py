"""Tests of `everest-ds jobs | logs | cancel | requeue | sweep` on run folders, without SLURM."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from everest_ds.cli.jobs import jobs_table, shorten
from everest_ds.errors import ExitCode
from everest_ds.jobs.events import JobEvent
from everest_ds.jobs.job_table import job_rows
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


@pytest.mark.parametrize("width", [60, 80, 400])
def test_every_row_of_the_table_names_its_run(tmp_path: Path, width: int) -> None:
    event = JobEvent("failed", "123_4", task="finetune", code=ExitCode.OUT_OF_MEMORY)
    folder = tmp_path / "a folder with a rather long name that fills a whole line of a terminal"
    runs = [make_run(folder / name, event, steps=9) for name in ("lr/000", "lr/001", "seed/000")]
    stream = io.StringIO()
    Console(file=stream, width=width).print(jobs_table(job_rows(runs), width))
    table = stream.getvalue().partition("\n\n")[0].splitlines()[1:]
    for run, row in zip(runs, table, strict=True):
        assert (str(run) if width == 400 else f"{run.parent.name}/{run.name}") in row
        assert "out of memory" in row and "9 of 9" in row and len(row) <= width


@pytest.mark.parametrize(
    ("paths", "width", "shown"),
    [
        (["runs/a", "runs/b"], 6, ["runs/a", "runs/b"]),
        (["runs/first", "x"], 6, ["…first", "x"]),
        (["a/long/000", "b/long/000"], 6, ["a/long/000", "b/long/000"]),  # their ends are equal
        (["a/b", "a/b"], -3, ["…b", "…b"]),  # two jobs of one run
    ],
)
def test_long_paths_lose_their_beginning_but_never_become_equal(
    paths: list[str], width: int, shown: list[str]
) -> None:
    assert shorten(paths, width) == shown


def test_a_run_that_was_started_by_hand_is_listed_and_its_log_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "mine", steps=9)
    (run / "environment.json").write_text("{}")
    (run / "logs").mkdir()
    (run / "logs" / "rank-0.log").write_text("2026-01-01 00:00:00,000 INFO step 9/9\n")
    assert run_main(monkeypatch, "jobs", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "mine" in printed and "finished" in printed and "9 of 9" in printed
    for options in ((), ("--job",)):
        assert run_main(monkeypatch, "logs", str(run), *options) == 0
        assert "step 9/9" in capsys.readouterr().out
    assert run_main(monkeypatch, "requeue", str(run)) == 5


@pytest.mark.parametrize("command", ["logs", "cancel", "requeue"])
def test_a_run_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run_main(monkeypatch, command, "no/such/run") == 2
    assert "no such run or job; given: 'no/such/run'" in capsys.readouterr().err
