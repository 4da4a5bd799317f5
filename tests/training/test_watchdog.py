"""Tests of the watchdog's file when two starts of a rank overlap, as after a network partition."""

from __future__ import annotations

from pathlib import Path

from everest_ds.training.watchdog import Watchdog


def test_each_start_of_a_rank_removes_only_its_own_file(tmp_path: Path) -> None:
    file = tmp_path / "rank-1.stacks"
    with Watchdog(file, 60):
        with Watchdog(file, 60):  # the later start ends first
            assert file.exists()
        assert not file.exists()
    earlier = Watchdog(file, 60).__enter__()
    with Watchdog(file, 60):
        earlier.__exit__(None, None, None)  # the earlier start ends first
        assert file.exists()
    assert not file.exists()
