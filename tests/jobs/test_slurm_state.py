"""Tests of the parsers of squeue and sacct output, with samples modelled on SLURM 22.05 and its manual."""

from __future__ import annotations

import pytest

from everest_ds.jobs.slurm_state import JobState, is_job_id, parse_sacct, parse_squeue

SQUEUE = """\
1|1|FAILED|768|0|0:12|2|m[1-2]|NonZeroExitCode
3_2|3|RUNNING|0|1|1-02:03:04|1|m1|None
9|9|PENDING|0|0|0:00|2||(Dependency)
7|7|FAILED|9|2|0:01|1|m3|NonZeroExitCode
8|8|PENDING|0|0|0:00|2||ReqNodeNotAvail, UnavailableNodes:m[1-2]|x
"""
SACCT = """\
1|1|OUT_OF_MEMORY|0:125|00:01:00|2|m[1-2]|None
3_2|5|CANCELLED by 1000|0:15|00:00:10|1|None assigned|None
6|6|FAILED|7:0|00:00:10|1|m1|NonZeroExitCode
"""


def test_squeue_lines() -> None:
    assert parse_squeue(SQUEUE) == [
        JobState("1", "1", "FAILED", 3, 0, "0:12", 2, "m[1-2]", "NonZeroExitCode"),
        JobState("3_2", "3", "RUNNING", 0, 1, "1-02:03:04", 1, "m1", ""),
        JobState("9", "9", "PENDING", 0, 0, "0:00", 2, "", "(Dependency)"),
        JobState("7", "7", "FAILED", 128 + 9, 2, "0:01", 1, "m3", "NonZeroExitCode"),
        JobState("8", "8", "PENDING", 0, 0, "0:00", 2, "", "ReqNodeNotAvail, UnavailableNodes:m[1-2]|x"),
    ]


def test_sacct_lines() -> None:
    assert [(s.job_id, s.raw_id, s.state, s.exit_code, s.nodes) for s in parse_sacct(SACCT)] == [
        ("1", "1", "OUT_OF_MEMORY", 128 + 125, "m[1-2]"),
        ("3_2", "5", "CANCELLED", 128 + 15, ""),
        ("6", "6", "FAILED", 7, "m1"),
    ]


def test_what_is_no_job_is_never_asked_for() -> None:
    assert [is_job_id(text) for text in ("12", "12_3", "local", "1;2", "", "1_")] == [True] * 2 + [False] * 4


@pytest.mark.parametrize(
    ("state", "code", "outcome"),
    [("COMPLETED", 0, 0), ("FAILED", 7, 7), ("CANCELLED", 0, 1), ("NODE_FAIL", 0, 1), ("TIMEOUT", 143, 143)],
)
def test_only_a_completed_job_has_the_outcome_0(state: str, code: int, outcome: int) -> None:
    assert JobState("7", "7", state, code).outcome == outcome
