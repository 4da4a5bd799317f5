"""A run's SLURM job: which one this is, whether it may go on, and whether to queue it again when it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from everest_ds.errors import ExitCode, RestartError, UsageError
from everest_ds.launch.job_log import JobEvent, append_event, read_events

# Of a stop that the user asked for by a file: the job is over, though the run is not.
STOPPED_BY_FILE = "RUN/kill"
# Starts from the same step: one more than bad luck may need.
_FRUITLESS_STARTS = 3
_MAX_RESTARTS = 50


@dataclass(frozen=True)
class Job:
    """This SLURM job.

    Attributes:
        restarts: how often it was requeued before this start.
        max_restarts: how often it may be, in all.
        nodes: SLURM's list of its nodes.
        signal_s: how long before the end SLURM was told to send the signal; None if nobody says.
    """

    job_id: str
    restarts: int
    max_restarts: int
    nodes: str | None
    signal_s: float | None

    def event(self, kind: JobEventKind, **facts: int | str | None) -> JobEvent:
        """An event of this start."""
        return JobEvent(kind, self.job_id, self.restarts, **facts)  # type: ignore[arg-type]


JobEventKind = Literal["started", "stopped", "requeued", "finished", "failed"]


def current_job(environ: Mapping[str, str] = os.environ) -> Job | None:
    """The job that this process belongs to; None outside SLURM.

    Raises:
        UsageError: a variable is not a whole number.
    """
    if "SLURM_JOB_ID" not in environ:
        return None
    return Job(
        environ["SLURM_JOB_ID"],
        _count(environ, "SLURM_RESTART_COUNT", 0),
        _count(environ, "EVEREST_MAX_RESTARTS", _MAX_RESTARTS),
        environ.get("SLURM_JOB_NODELIST"),
        _count(environ, "EVEREST_SIGNAL_SECONDS", 0) or None,
    )


def begin(job: Job, run: Path, step: int) -> None:
    """Note that the job starts from `step`.

    Raises:
        RestartError: it was restarted too often, or again and again without getting any further.
    """
    refusal = why_not_start(job, read_events(run), step)
    if refusal is not None:
        _append(run, job.event("failed", step=step, reason=str(refusal), code=refusal.exit_code))
        raise refusal
    _append(run, job.event("started", step=step, nodes=job.nodes))


def why_not_start(job: Job, events: Sequence[JobEvent], step: int) -> RestartError | None:
    """What speaks against this start; None if nothing does."""
    if job.restarts > job.max_restarts:
        return RestartError(
            f"job {job.job_id} was restarted {job.restarts} times",
            allowed=job.max_restarts,
            fix="see jobs.jsonl for the reasons; submit it again to go on",
        )
    starts = [
        e for e in events if e.event == "started" and e.job_id == job.job_id and e.restarts < job.restarts
    ]
    recent = starts[1 - _FRUITLESS_STARTS :]
    if len(recent) == _FRUITLESS_STARTS - 1 and all(e.step == step for e in recent):
        return RestartError(
            f"job {job.job_id} makes no progress: start number {len(starts) + 1} finds it at step {step},"
            " as the two before it",
            given=_last_reason(events, job),
            fix="put that right, or lower run.save_every_steps; then submit it again",
        )
    return None


def _last_reason(events: Sequence[JobEvent], job: Job) -> str:
    ends = [e.reason for e in events if e.job_id == job.job_id and e.event != "started" and e.reason]
    return ends[-1] if ends else "no reason known: a node was lost, or the job was killed"


@dataclass(frozen=True)
class Verdict:
    """What is to become of a job whose ranks have ended; `bad_nodes` is SLURM's list of nodes to blame."""

    requeue: bool
    reason: str
    bad_nodes: str | None = None


def judge(job: Job, events: Sequence[JobEvent], code: int, state: str) -> Verdict:
    """Whether to queue the job again.

    Args:
        events: of the run, of which those of this start count.
        code: srun's exit code.
        state: SLURM's word on the job and the reason, such as `RUNNING/None`.
    """
    mine = [e for e in events if e.job_id == job.job_id and e.restarts == job.restarts]
    verdict = _by_events(mine, code)
    if not verdict.requeue:
        return verdict
    if not may_be_requeued(state):
        return Verdict(False, f"{verdict.reason}; SLURM says {state}")
    if job.restarts >= job.max_restarts:
        return Verdict(False, f"{verdict.reason}; restarted {job.restarts} times, which is the limit")
    return verdict


def may_be_requeued(state: str) -> bool:
    """Whether the job lives, or ran out of time. One that was cancelled, or that SLURM requeues, does not."""
    name, _, reason = state.partition("/")
    return name == "RUNNING" or reason == "TimeLimit"


def _by_events(mine: Sequence[JobEvent], code: int) -> Verdict:
    """By what the ranks said, else by the exit code."""
    own = [e for e in mine if e.event == "failed" and e.code not in (None, ExitCode.RANK_LOST)]
    if own:
        is_node = own[0].code == ExitCode.BAD_NODE
        return Verdict(is_node, own[0].reason or "failed", own[0].nodes if is_node else None)
    last = next((e for e in reversed(mine) if e.event in ("stopped", "finished", "failed")), None)
    if last is not None and last.event == "stopped":
        return Verdict(last.reason != STOPPED_BY_FILE, f"stopped by {last.reason}")
    if code == ExitCode.OK or (last is not None and last.event == "finished"):
        return Verdict(False, "finished")
    if last is not None:
        return Verdict(True, last.reason or "a rank was lost")
    return _by_code(code)


def _by_code(code: int) -> Verdict:
    if code == ExitCode.STOPPED:
        return Verdict(True, "stopped before the first step")
    if code > 128:  # as a shell counts signals
        return Verdict(True, f"a rank was killed by signal {code - 128}")
    return Verdict(code == ExitCode.RANK_LOST, f"failed with exit code {code}")


def end(job: Job, run: Path, code: int, state: str) -> Verdict:
    """Judge, and note the outcome in the run's folder if no rank has."""
    events = read_events(run)
    verdict = judge(job, events, code, state)
    told = any(e.job_id == job.job_id and e.restarts == job.restarts and e.event != "started" for e in events)
    if verdict.requeue:
        _append(run, job.event("requeued", reason=verdict.reason))
    elif not told:
        kind: JobEventKind = "finished" if code == ExitCode.OK else "failed"
        _append(run, job.event(kind, reason=verdict.reason, code=code))
    return verdict


def note(job: Job | None, run: Path, kind: JobEventKind, **facts: int | str | None) -> None:
    """A rank's own word on how it ended. A full disk must not hide what it is told about."""
    if job is not None:
        _append(run, job.event(kind, **facts))


def _append(run: Path, event: JobEvent) -> None:
    try:
        append_event(run, event)
    except OSError as error:
        print(f"everest-ds: {run}: {event.event} is not in its log: {error}", file=sys.stderr, flush=True)


def _count(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"environment variable {name}", given=repr(text), allowed="a whole number")
    return int(text)
