"""The SLURM job of this process: its identity, its permission to start, and the decision to requeue it."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from everest_ds.errors import ExitCode, RestartError, UsageError
from everest_ds.jobs.events import EventKind, JobEvent, append_event, read_events
from everest_ds.jobs.slurm_state import SIGNAL_CODE
from everest_ds.training.stop import StopReason
from everest_ds.units import format_duration

# A job counts as stuck after this many starts from the same step; two starts can be bad luck.
_FRUITLESS_STARTS = 3
MAX_RESTARTS = 50


@dataclass(frozen=True)
class SlurmJob:
    """The SLURM job that this process belongs to.

    Attributes:
        job_id: SLURM_JOB_ID.
        restarts: number of times that the job was requeued before this start.
        max_restarts: number of restarts allowed in all.
        nodes: the job's nodes in SLURM's node-list notation.
        signal_s: lead time of the signal that the job sends before its end, in seconds; None if unknown.
        limit_s: time limit of each start, in seconds; None if there is none.
    """

    job_id: str
    restarts: int
    max_restarts: int
    nodes: str | None
    signal_s: float | None
    limit_s: float | None = None

    def event(self, kind: EventKind, **facts: int | str | None) -> JobEvent:
        """Return a log event of this start of the job."""
        return JobEvent(kind, self.job_id, self.restarts, **facts)  # type: ignore[arg-type]


@dataclass(frozen=True)
class RequeueDecision:
    """The decision whether to requeue a job whose ranks have ended.

    Attributes:
        requeue: True if the job goes back into the queue.
        reason: reason for the decision.
        bad_nodes: nodes at fault, in SLURM's node-list notation; the next start excludes them.
    """

    requeue: bool
    reason: str
    bad_nodes: str | None = None


def current_job(environ: Mapping[str, str] = os.environ) -> SlurmJob | None:
    """Return the SLURM job that this process belongs to, or None outside SLURM.

    Raises:
        UsageError: if a variable is not a whole number.
    """
    if "SLURM_JOB_ID" not in environ:
        return None
    return SlurmJob(
        environ["SLURM_JOB_ID"],
        _count(environ, "SLURM_RESTART_COUNT", 0),
        _count(environ, "EVEREST_MAX_RESTARTS", MAX_RESTARTS),
        environ.get("SLURM_JOB_NODELIST"),
        _count(environ, "EVEREST_LEAD_SECONDS", 0) or None,
        _count(environ, "EVEREST_LIMIT_SECONDS", 0) or None,
    )


def record_start(job: SlurmJob, run: Path, step: int | None) -> None:
    """Log that the job starts from `step`, or that it may not start.

    Args:
        job: the job that starts.
        run: its run folder.
        step: step of the newest checkpoint; None for a command that makes none, such as an evaluation.

    Raises:
        RestartError: if the job was restarted too often, or repeatedly without progress.
    """
    refusal = why_not_start(job, read_events(run), step)
    if refusal is not None:
        _append(run, job.event("failed", step=step, reason=str(refusal), code=refusal.exit_code))
        raise refusal
    _append(run, job.event("started", step=step, nodes=job.nodes))


def why_not_start(job: SlurmJob, events: Sequence[JobEvent], step: int | None) -> RestartError | None:
    """Return why the job must not start again, or None.

    A start that was stopped from outside says nothing about the run, unless its time limit stopped it. An
    evaluation makes no checkpoints, so that only its time limit tells that it will never end.
    """
    if job.restarts > job.max_restarts:
        return RestartError(
            f"job {job.job_id} was restarted {job.restarts} times",
            allowed=job.max_restarts,
            fix="see jobs.jsonl for the reasons; submit the job again to resume the run",
        )
    own = [e for e in events if e.job_id == job.job_id and e.restarts < job.restarts]
    starts = [e for e in own if e.event == "started"]
    timed_out = [e for e in starts if _reached_limit(e, own, job.limit_s)]
    telling = [e for e in starts if e in timed_out or (step is not None and not _was_stopped(e, own))]
    recent = telling[1 - _FRUITLESS_STARTS :]
    if len(recent) < _FRUITLESS_STARTS - 1 or any(e.step != step for e in recent):
        return None
    begins = "its test anew" if step is None else f"at step {step}"
    subject = (
        f"job {job.job_id} makes no progress: start number {len(starts) + 1} begins {begins},"
        " as did the two starts before it"
    )
    if recent[-1] in timed_out:
        limit = f"a time limit of {format_duration(job.limit_s or 0)}"
        return RestartError(subject, given=limit, fix="submit the job with a longer --time")
    # The refusal of an earlier start repeats the reason, so it is not quoted.
    ends = [e.reason for e in own if e.event != "started" and e.code != ExitCode.RESTARTS and e.reason]
    return RestartError(
        subject,
        given=ends[-1] if ends else "no reason was logged: a node was lost, or the job was killed",
        fix="remove the cause, or lower run.save_every_steps; then submit the job again",
    )


def _ends_of(start: JobEvent, events: Sequence[JobEvent]) -> list[JobEvent]:
    """Return how a start of a job ended, and what followed, among the events of that job."""
    return [e for e in events if e.restarts == start.restarts and e.event not in ("submitted", "started")]


def _was_stopped(start: JobEvent, events: Sequence[JobEvent]) -> bool:
    """Return whether a start of a job ended because it was asked to stop, with or without a checkpoint."""
    return any(e.event == "stopped" or e.code == ExitCode.STOPPED for e in _ends_of(start, events))


def _reached_limit(start: JobEvent, events: Sequence[JobEvent], limit_s: float | None) -> bool:
    """Return whether the time limit stopped a start of a job: the warning comes after half of it or later."""
    if limit_s is None or not _was_stopped(start, events):
        return False
    return _ends_of(start, events)[0].seconds - start.seconds >= limit_s / 2


def record_end(job: SlurmJob, run: Path, code: int, state: str) -> RequeueDecision:
    """Decide whether to requeue the job; log a requeue, or the job's outcome if no rank has logged it."""
    events = read_events(run)
    decision, own = decide_requeue(job, events, code, state), _events_of_start(job, events)
    if decision.requeue:
        _append(run, job.event("requeued", reason=decision.reason, code=code))
    elif code == ExitCode.OK and not own:
        _append(run, job.event("finished", reason=decision.reason))
    elif all(event.event == "started" for event in own):
        _append(run, job.event("failed", reason=decision.reason, code=code or ExitCode.RANK_LOST))
    return decision


def decide_requeue(job: SlurmJob, events: Sequence[JobEvent], code: int, state: str) -> RequeueDecision:
    """Decide whether the job goes back into the queue.

    Args:
        job: the job that is ending.
        events: events of the run; only those of this start of the job count.
        code: srun's exit code.
        state: SLURM's state and reason of the job, such as `RUNNING/None`.
    """
    decision = _decide_by_events(_events_of_start(job, events), code)
    if not decision.requeue:
        return decision
    if not may_be_requeued(state):
        return RequeueDecision(False, f"{decision.reason}; SLURM reports {state}")
    if job.restarts >= job.max_restarts:
        limit = f"restarted {job.restarts} times, which is the limit"
        return RequeueDecision(False, f"{decision.reason}; {limit}")
    return decision


def may_be_requeued(state: str) -> bool:
    """Return whether requeueing is allowed: the job is still running, or ended at its time limit.

    A job that was cancelled, or that SLURM itself requeues, must not be requeued here.
    """
    name, _, reason = state.partition("/")
    return name == "RUNNING" or reason == "TimeLimit"


def log_event(job: SlurmJob | None, run: Path, kind: EventKind, **facts: int | str | None) -> None:
    """Log an event of this rank, if the rank belongs to a SLURM job.

    A log that cannot be written is reported on stderr and does not hide the event that was to be logged.
    """
    if job is not None:
        _append(run, job.event(kind, **facts))


def _events_of_start(job: SlurmJob, events: Sequence[JobEvent]) -> list[JobEvent]:
    return [e for e in events if e.job_id == job.job_id and e.restarts == job.restarts]


def _decide_by_events(events: Sequence[JobEvent], code: int) -> RequeueDecision:
    """Decide from the events that the ranks logged, or from the exit code if there are none."""
    failures = [e for e in events if e.event == "failed" and e.code not in (None, ExitCode.RANK_LOST)]
    if failures:
        first, is_node = failures[0], failures[0].code == ExitCode.BAD_NODE
        return RequeueDecision(is_node, first.reason or "failed", first.nodes if is_node else None)
    last = next((e for e in reversed(events) if e.event in ("stopped", "finished", "failed")), None)
    if last is not None and last.event == "stopped":
        return RequeueDecision(last.reason != StopReason.KILL.origin, f"stopped by {last.reason}")
    if last is not None and last.event == "finished":
        return RequeueDecision(False, "finished")
    if last is not None:
        return RequeueDecision(True, last.reason or "a rank was lost")
    return _decide_by_code(code, began=any(e.event == "started" for e in events))


def _decide_by_code(code: int, began: bool) -> RequeueDecision:
    if code == ExitCode.OK and began:  # srun reports 0 for tasks of which it lost the node
        return RequeueDecision(True, "a node was lost: the ranks did not report their end")
    if code == ExitCode.OK:  # the log takes no events, so that a restart would not report its end either
        return RequeueDecision(False, "finished")
    if code == ExitCode.STOPPED:
        return RequeueDecision(True, "stopped before the first step")
    if code > SIGNAL_CODE:
        return RequeueDecision(True, f"a rank was killed by signal {code - SIGNAL_CODE}")
    return RequeueDecision(code == ExitCode.RANK_LOST, f"failed with exit code {code}")


def _append(run: Path, event: JobEvent) -> None:
    try:
        append_event(run, event)
    except OSError as error:
        message = f"everest-ds: {run}: the event `{event.event}` could not be logged: {error}"
        print(message, file=sys.stderr, flush=True)


def _count(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit()):
        raise UsageError(
            f"environment variable {name} is not a whole number",
            given=repr(text),
            allowed="an integer, 0 or more",
        )
    return int(text)
