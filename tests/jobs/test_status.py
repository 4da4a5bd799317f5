"""Tests of a job's status, reason and next action, derived from SLURM's state and the run's event log."""

from __future__ import annotations

import pytest

from everest_ds.errors import ExitCode
from everest_ds.jobs.events import JobEvent
from everest_ds.jobs.slurm_state import JobState
from everest_ds.jobs.status import LOCAL, NEXT, explain_exit_code, job_status, local_status


def slurm(state: str, code: int = 0, restarts: int = 0, reason: str = "") -> JobState:
    return JobState("7", "7", state, code, restarts, reason=reason)


@pytest.mark.parametrize(
    ("record", "state"),
    [
        (slurm("PENDING", reason="Priority"), "queued"),
        (slurm("PENDING", restarts=1, reason="BeginTime"), "requeued"),
        (slurm("PENDING", reason="JobHeldUser"), "held"),
        (slurm("PENDING", reason="DependencyNeverSatisfied"), "dependency failed"),
        (slurm("CANCELLED", reason="DependencyNeverSatisfied"), "dependency failed"),
        (slurm("RUNNING"), "running"),
        (slurm("COMPLETING"), "ending"),
        (slurm("COMPLETED"), "finished"),
        (slurm("CANCELLED"), "cancelled"),
        (slurm("PREEMPTED"), "preempted"),
        (slurm("NODE_FAIL"), "node failure"),
        (slurm("TIMEOUT"), "time limit"),
        (slurm("OUT_OF_MEMORY"), "out of host memory"),
        (slurm("FAILED", ExitCode.OUT_OF_MEMORY), "out of memory"),
        (slurm("FAILED", ExitCode.RANK_LOST), "rank lost"),
        (slurm("FAILED", ExitCode.DIVERGED), "diverged"),
        (slurm("FAILED", ExitCode.STOPPED), "stopped"),
        (slurm("FAILED", ExitCode.BAD_NODE), "bad node"),
        (slurm("FAILED", ExitCode.RESTARTS), "too many restarts"),
        (slurm("FAILED", ExitCode.DATA), "failed"),
        (slurm("FAILED", 137), "failed"),
        (None, "forgotten"),
    ],
)
def test_every_job_has_a_state_and_a_next_action(record: JobState | None, state: str) -> None:
    status = job_status("runs/a", "7", record, [JobEvent("submitted", "7")])
    assert status.state == state and state in NEXT
    assert "{" not in status.next and ("runs/a" in status.next) == ("{run}" in NEXT[state])


@pytest.mark.parametrize(
    ("job_id", "last", "state"),
    [
        ("7", JobEvent("finished", "7"), "finished"),
        ("7", JobEvent("stopped", "7", reason="SIGUSR1"), "stopped"),
        ("7", JobEvent("failed", "7", code=ExitCode.OUT_OF_MEMORY), "out of memory"),
        ("7", JobEvent("failed", "7", code=ExitCode.DATA), "failed"),
        ("7", JobEvent("requeued", "7"), "forgotten"),
    ],
)
def test_the_log_of_a_job_that_slurm_has_forgotten_gives_its_state(
    job_id: str, last: JobEvent, state: str
) -> None:
    assert job_status("runs/a", job_id, None, [JobEvent("submitted", job_id), last]).state == state


STARTED = JobEvent("started", LOCAL, task="pretrain")


@pytest.mark.parametrize(
    ("events", "active", "complete", "state"),
    [
        ([], True, False, "running"),
        ([], False, True, "finished"),
        ([], False, False, "interrupted"),
        ([STARTED], True, False, "running"),
        ([STARTED], False, False, "interrupted"),  # killed before it could log its end
        ([JobEvent("started", LOCAL, task="evaluate")], False, True, "running"),
        ([STARTED, JobEvent("failed", LOCAL, code=ExitCode.DATA)], False, False, "failed"),
        ([STARTED, JobEvent("stopped", LOCAL, code=ExitCode.STOPPED)], False, False, "stopped"),
    ],
)
def test_a_run_without_slurm_has_a_state_and_no_action_of_slurm(
    events: list[JobEvent], active: bool, complete: bool, state: str
) -> None:
    status = local_status("runs/a", events, active, complete)
    assert status.state == state and state in NEXT
    assert "requeue" not in status.next and "--job" not in status.next and "{" not in status.next


def test_the_reason_in_the_job_log_takes_precedence() -> None:
    logged = [JobEvent("failed", "7", reason="video.mp4: cannot be decoded", code=3)]
    assert (
        job_status("r", "7", slurm("FAILED", 3, reason="NonZeroExitCode"), logged).reason == logged[0].reason
    )
    assert job_status("r", "7", slurm("FAILED", 3, reason="NonZeroExitCode"), []).reason == explain_exit_code(
        3
    )
    assert job_status("r", "7", slurm("PENDING", reason="Priority"), []).reason == "Priority"


def test_every_exit_code_of_ours_is_explained() -> None:
    assert all(": " in explain_exit_code(code) for code in ExitCode if code != ExitCode.OK)
    assert explain_exit_code(139) == "ended by signal 11" and explain_exit_code(44) == "exit code 44"
