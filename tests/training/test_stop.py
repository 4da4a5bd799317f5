"""Tests of requests to stop or save, and of the warning about too little time to stop."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest

from everest_ds.training.stop import Grace, StopReason, StopRequest


def test_files_and_signals_ask_and_the_strongest_request_counts(tmp_path: Path) -> None:
    with StopRequest(tmp_path) as stop, StopRequest() as other_rank:
        assert stop.reason() == StopReason.NONE
        (tmp_path / "save").touch()
        assert stop.reason() == StopReason.SAVE and not stop.reason().stops
        os.kill(os.getpid(), signal.SIGUSR1)
        assert other_rank.reason() == StopReason.SIGNAL and other_rank.reason().stops
        (tmp_path / "kill").touch()
        assert stop.reason() == StopReason.KILL


def test_an_acknowledged_file_does_not_ask_again(tmp_path: Path) -> None:
    stop = StopRequest(tmp_path)
    (tmp_path / "save").touch()
    stop.acknowledge(stop.reason())
    assert stop.reason() == StopReason.NONE and list(tmp_path.iterdir()) == []


def test_too_short_a_grace_time_is_logged_once_and_at_the_next_start(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("everest_ds"), "propagate", True)
    grace = Grace(30.0, tmp_path / "grace.json")
    grace.note_step(4.0)
    grace.note_save(6.0)
    assert grace.needed_s == 20.0 and not caplog.records
    for _ in range(2):
        grace.note_save(16.0)
    (logged,) = caplog.records
    assert "take 40s, but --signal leaves 30s; fix: sbatch --signal=USR1@41" in logged.getMessage()
    Grace(30.0, tmp_path / "grace.json")
    assert len(caplog.records) == 2
