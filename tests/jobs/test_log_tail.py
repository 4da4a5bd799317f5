"""Tests of reading the newest lines of a job's logs."""

from __future__ import annotations

from pathlib import Path

from everest_ds.jobs.log_tail import LogTail


def test_logs_of_all_ranks_are_merged_by_time_and_followed(tmp_path: Path) -> None:
    (tmp_path / "rank-0.log").write_text("2026-01-01 00:00:00,000 a\n2026-01-01 00:00:02,000 c\n trace\nhalf")
    (tmp_path / "rank-1.log").write_text("2026-01-01 00:00:01,000 b\n")
    tail = LogTail(tmp_path, "rank-*.log")
    assert [line[-8:].split()[-1] for line in tail.last(3)] == ["b", "c", "trace"]
    with open(tmp_path / "rank-0.log", "a") as stream:
        stream.write(" done\n")
    (tmp_path / "rank-2.log").write_text("new\n")
    assert tail.new() == ["[rank-0] half done", "[rank-2] new"]
    assert tail.new() == []
