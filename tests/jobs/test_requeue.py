"""Tests of the decisions whether a job may start and whether it is requeued."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from everest_ds.errors import ExitCode, RestartError, RunFolderError, UsageError
from everest_ds.jobs.events import JobEvent, append_event, read_events
from everest_ds.jobs.job_ending import logged_end
from everest_ds.jobs.requeue import SlurmJob, current_job, decide_requeue, record_end, record_start
from everest_ds.training.run_folder import RunFolder

LIVE = "RUNNING/None"


def job(restarts: int = 0, limit: int = 5) -> SlurmJob:
    return SlurmJob("7", restarts, limit, "node[1-2]", 300.0)


def test_outside_slurm_there_is_no_job_and_inside_it_counts_restarts() -> None:
    assert current_job({}) is None
    environ = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2", "SLURM_JOB_NODELIST": "a[1-2]"}
    assert current_job(environ) == SlurmJob("7", 2, 50, "a[1-2]", None)
    with pytest.raises(UsageError, match="EVEREST_MAX_RESTARTS"):
        current_job(environ | {"EVEREST_MAX_RESTARTS": "many"})


def test_the_third_start_from_the_same_step_is_refused_and_says_why(tmp_path: Path) -> None:
    record_start(job(0), tmp_path, 10)
    record_start(job(1), tmp_path, 20)
    assert record_end(job(1), tmp_path, 137, LIVE).requeue
    record_start(job(2), tmp_path, 20)
    with pytest.raises(RestartError, match=r"no progress.*start number 4.*step 20.*killed by signal 9"):
        record_start(job(3), tmp_path, 20)
    assert read_events(tmp_path)[-1].code == ExitCode.RESTARTS


def test_a_refusal_does_not_quote_the_refusals_before_it(tmp_path: Path) -> None:
    for restarts in range(2):
        record_start(job(restarts), tmp_path, 5)
        record_end(job(restarts), tmp_path, 6, LIVE)
    refusals = []
    for restarts in range(2, 5):  # requeued by hand, again and again
        with pytest.raises(RestartError) as refused:
            record_start(job(restarts), tmp_path, 5)
        refusals.append(str(refused.value))
    assert len(set(refusals)) == 1 and refusals[0].count("given:") == 1


@pytest.mark.parametrize(
    ("limit", "lasts", "step", "refused"),
    [
        (120, 90, 0, True),
        (120, 90, None, True),  # an evaluation, which starts anew each time
        (120, 20, 0, False),  # preempted, say
        (None, 90, None, False),
        (3600, 3300, 7, True),
    ],
)
def test_starts_that_their_time_limit_stops_are_no_progress(
    tmp_path: Path, limit: float | None, lasts: float, step: int | None, refused: bool
) -> None:
    for restarts in range(2):
        began = 1000.0 * restarts
        start = JobEvent("started", "7", restarts, step=step, seconds=began)
        end = JobEvent("requeued", "7", restarts, code=ExitCode.STOPPED, seconds=began + lasts)
        for event in (start, end):
            append_event(tmp_path, event)
    third = SlurmJob("7", 2, 5, None, 30.0, limit)
    if not refused:
        return record_start(third, tmp_path, step)
    with pytest.raises(RestartError, match=r"given: a time limit of .*; fix: .*longer --time"):
        record_start(third, tmp_path, step)


def test_progress_or_another_job_starts_the_count_anew(tmp_path: Path) -> None:
    for restarts, step in enumerate([0, 0, 10, 10, 20]):
        record_start(job(restarts), tmp_path, step)
    record_start(SlurmJob("8", 0, 5, None, None), tmp_path, 20)


def test_slurms_own_restarts_count_too(tmp_path: Path) -> None:
    with pytest.raises(RestartError, match="restarted 6 times; allowed: 5"):
        record_start(job(6), tmp_path, 100)


@pytest.mark.parametrize(
    "events, code, state, requeue, reason",
    [
        ([], 75, LIVE, True, "before the first step"),
        ([], 137, LIVE, True, "killed by signal 9"),
        ([], 6, LIVE, True, "exit code 6"),
        ([], 1, LIVE, False, "exit code 1"),
        ([], 0, LIVE, False, "finished"),  # no event could be logged
        # srun reports 0 for the tasks of a crashed node
        ([("started", None, None)], 0, LIVE, True, "a node was lost"),
        ([("started", None, None)], 0, "COMPLETING/NodeFail", False, "SLURM reports COMPLETING"),
        ([], 137, "COMPLETING/None", False, "SLURM reports COMPLETING"),  # cancelled with scancel
        ([], 143, "COMPLETING/TimeLimit", True, "signal 15"),
        # the other ranks were killed while this one ended
        ([("stopped", "a signal", None)], 137, LIVE, True, "a signal"),
        ([("stopped", "RUN/kill", None)], 75, LIVE, False, "RUN/kill"),
        ([("failed", "rank 0 lost a peer", 6)], 6, LIVE, True, "lost a peer"),
        # rank 1 ran out of memory, and rank 0 only lost its connection to rank 1
        ([("failed", "rank 0 lost a peer", 6), ("failed", "out of memory", 7)], 7, LIVE, False, "out of"),
        ([("failed", "node2 cannot take part", 9)], 9, LIVE, True, "node2"),
        # the job was killed while a rank closed its files
        ([("finished", None, None)], 143, LIVE, False, "finished"),
    ],
)
def test_a_job_is_queued_again_if_that_can_help(
    events: list[tuple[str, str | None, int | None]], code: int, state: str, requeue: bool, reason: str
) -> None:
    log = [JobEvent(kind, "7", 1, reason=why, code=number) for kind, why, number in events]  # type: ignore[arg-type]
    earlier = [JobEvent("stopped", "7", 0, reason="a signal"), JobEvent("failed", "6", 1, code=7)]
    decision = decide_requeue(job(1), earlier + log, code, state)
    assert decision.requeue == requeue and reason in decision.reason


def test_a_crashed_node_is_no_finished_job(tmp_path: Path) -> None:
    record_start(job(), tmp_path, 3)
    assert not record_end(job(), tmp_path, 0, "COMPLETING/NodeFail").requeue  # SLURM requeues it
    assert [(e.event, e.code) for e in read_events(tmp_path)] == [
        ("started", None),
        ("failed", ExitCode.RANK_LOST),
    ]


def test_at_the_limit_nothing_is_queued_again() -> None:
    decision = decide_requeue(job(5), [], 75, LIVE)
    assert not decision.requeue and "restarted 5 times, which is the limit" in decision.reason


def test_bad_nodes_are_named_for_exclusion() -> None:
    failed = JobEvent("failed", "7", 0, reason="node2: other data", nodes="node2", code=9)
    assert decide_requeue(job(), [failed], 9, LIVE).bad_nodes == "node2"


def test_a_run_folder_that_is_deleted_under_a_rank_is_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    RunFolder(run).lock_file.touch()
    with pytest.raises(FileNotFoundError), logged_end(job(), run, 0):
        (run / "absent").read_text()  # an ordinary bug, while the folder is there
    assert read_events(run)[-1].code == ExitCode.FAILURE
    shutil.rmtree(run)
    with pytest.raises(RunFolderError, match="was deleted while"), logged_end(job(), run, 0):
        (run / "metrics.jsonl").read_text()
    with pytest.raises(FileNotFoundError), logged_end(None, run, 0):
        (tmp_path / "another file").read_text()
    assert not run.exists()
