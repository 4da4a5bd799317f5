"""Tests of the GPU check, in a rehearsal: its records, its treatment of failures, and its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"


@pytest.fixture
def record(tmp_path: Path) -> Any:
    from gpu_check.record import Record, Session

    return Record(Session(tmp_path, time.time() + 60, False, None), "engine")


def rows(folder: Path, part: str = "engine") -> list[dict[str, Any]]:
    return json.loads((folder / f"{part}.json").read_text())["rows"]


def test_every_row_is_on_the_disk_before_the_next_is_measured(record: Any, tmp_path: Path) -> None:
    seen: list[int] = []

    def measure() -> dict[str, Any]:
        seen.append(len(rows(tmp_path)))
        return {"step_ms": 1.0}

    for case in ("a", "b"):
        record.measure(case, measure)
    assert seen == [0, 1] and rows(tmp_path)[-1] == {"case": "b", "step_ms": 1.0}


def test_failures_and_lack_of_time_are_rows_and_the_next_case_runs(record: Any, tmp_path: Path) -> None:
    def fail(error: Exception) -> dict[str, Any]:
        raise error

    record.measure("too large", lambda: fail(torch.OutOfMemoryError("CUDA out of memory. Tried ...")))
    record.measure("broken", lambda: fail(ValueError("no such kernel")))
    record.measure("too long", lambda: fail(AssertionError("must not run")), needs_s=1000)
    record.measure("well", lambda: {"step_ms": 2.0})
    record.close()
    reasons = [row.get("error") or row.get("left_out", "") for row in rows(tmp_path)]
    assert reasons[:2] == ["out of memory", "ValueError: no such kernel"]
    assert "1000 are needed" in reasons[2] and reasons[3] == ""


def test_tables_say_where_and_list_what_is_missing(record: Any, tmp_path: Path) -> None:
    from gpu_check.tables import read_parts, render

    phases = {"load": 0.0, "forward": 10.25, "backward": 20.0, "update": 5.0}
    record.add("pretrain", {"step_ms": 35.55, "clips_per_s": 1800.0, "mfu_pct": 40.1, "host_ms": phases})
    record.add("too large", {"error": "out of memory"})
    record.close()
    text = render(read_parts([tmp_path / "empty", tmp_path]))
    assert "| pretrain | 35.5 | - | 1800 | 40.1 % | 10.2 / 20.0 / 5.0 |" in text
    assert "too large: **out of memory**" in text
    for fact in (torch.__version__, "DeepSpeed", "commit"):
        assert fact in text
    assert "rehearsal" not in text


def test_the_state_of_the_gpu_is_told_with_names() -> None:
    from gpu_check.tables import _state

    csv = "driver_version, pstate, clocks.current.sm [MHz]\n580.159.04, P0, 1980 MHz\n580.159.04, P8, 345 MHz"
    assert _state(csv) == "; driver_version 580.159.04, pstate P0, clocks.current.sm 1980 MHz"
    assert _state(None) == ""


def check(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{TOOLS}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "gpu_check", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path: Path) -> None:
    done = check(tmp_path, "engine")
    assert done.returncode == 2 and done.stderr.startswith(
        "error: no CUDA device on this machine; fix: --tiny"
    )


def rehearse(out: Path, part: str) -> list[dict[str, Any]]:
    done = check(out, part, "--tiny")
    assert done.returncode == 0, done.stderr
    found = rows(out, part)
    assert found and not any("error" in row or "left_out" in row for row in found), done.stdout
    return found


@pytest.mark.slow
def test_a_rehearsal_steps_every_case_and_traces_two(tmp_path: Path) -> None:
    steps = [row for part in ("engine", "changes") for row in rehearse(tmp_path, part) if "step_ms" in row]
    assert all(row["step_ms"] > 0 and row["finite_loss"] for row in steps)
    assert [bool(row["profile"]["operators"]) for row in steps if "profile" in row] == [True, True]
    assert len(list(tmp_path.glob("*.trace.json.gz"))) == 2


@pytest.mark.slow
def test_a_rehearsal_trains_from_videos_stops_and_resumes(tmp_path: Path) -> None:
    found = {row["case"]: row for row in rehearse(tmp_path, "end_to_end")}
    assert found["resume"]["from_step"] >= found["train from video files"]["steps"] >= 20
