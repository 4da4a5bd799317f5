"""The status of a job, its reason and the next action, derived from SLURM's state and the run's event log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everest_ds.errors import ExitCode
from everest_ds.jobs.events import JobEvent
from everest_ds.jobs.slurm_state import SIGNAL_CODE, JobState

LOCAL = "local"  # the id of a job that runs without SLURM
_RESUME = "`everest-ds requeue {run}` resumes from the newest checkpoint"
_RESUME_LOCALLY = "the same command resumes from the newest checkpoint"
_READ_LOGS = "`everest-ds logs {run} --job` shows the cause; correct it, then submit again"

# State -> next action; {run} and {job} are filled in.
NEXT = {
    "queued": "wait; `squeue --start --jobs={job}` shows the expected start",
    "held": "`scontrol release {job}`",
    "requeued": "nothing: SLURM restarts the job, which resumes from its newest checkpoint",
    "running": "`everest-ds logs {run} -f`",
    "ending": "nothing: SLURM is releasing the job's nodes",
    "finished": "`everest-ds report {run}`",
    "stopped": _RESUME,
    "preempted": _RESUME,
    "node failure": f"{_RESUME}; add --exclude=NODE to submit if a node fails again",
    "time limit": f"{_RESUME}; if nothing was saved, submit with --signal=USR1@600",
    "cancelled": _RESUME,
    "rank lost": f"{_RESUME}; `everest-ds logs {{run}} --job` names the rank",
    "out of memory": "submit again with a lower batch.micro_batch_size, or with recompute.mode=attention",
    "out of host memory": "submit again with fewer data.num_workers, or with more --mem",
    "bad node": f"{_RESUME}; report the node to its administrators, or exclude it with --exclude",
    "too many restarts": "remove the cause, then `everest-ds requeue {run}`",
    "diverged": "lower schedule.base_lr or set optimizer.clip_grad_norm, in another run.dir",
    "dependency failed": "correct the job that this one depends on, then submit again",
    "failed": _READ_LOGS,
    "interrupted": _RESUME_LOCALLY,
    "forgotten": "SLURM no longer knows the job; `everest-ds requeue {run}` submits it again",
}

_STATE_OF_SLURM_STATE = {
    "COMPLETED": "finished",
    "PREEMPTED": "preempted",
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure",
    "TIMEOUT": "time limit",
    "DEADLINE": "time limit",
    "OUT_OF_MEMORY": "out of host memory",
    "REQUEUE_HOLD": "held",
    "SPECIAL_EXIT": "held",
    "COMPLETING": "ending",
}
_STATE_OF_EXIT_CODE = {
    ExitCode.STOPPED: "stopped",
    ExitCode.OUT_OF_MEMORY: "out of memory",
    ExitCode.RANK_LOST: "rank lost",
    ExitCode.DIVERGED: "diverged",
    ExitCode.BAD_NODE: "bad node",
    ExitCode.RESTARTS: "too many restarts",
}
_EXIT_CODE_MEANING = {
    ExitCode.FAILURE: "a bug or an unforeseen failure",
    ExitCode.USAGE: "the command line or the config is wrong",
    ExitCode.DATA: "a video, a manifest or a label is missing or damaged",
    ExitCode.CHECKPOINT: "a checkpoint is missing, damaged or belongs to another model",
    ExitCode.RUN_FOLDER: "the run folder belongs to another config or is in use",
    ExitCode.RANK_LOST: "another rank was lost",
    ExitCode.OUT_OF_MEMORY: "accelerator memory is full",
    ExitCode.BAD_NODE: "the preflight found an unfit node",
    ExitCode.RESTARTS: "the job restarted too often, or without progress",
    ExitCode.DIVERGED: "the loss is no longer finite",
    ExitCode.STOPPED: "stopped on request and saved",
}
_NOT_TRAINING = ("evaluate", "profile", "report")  # tasks that do not lock the run folder
_ENDS = ("finished", "failed", "stopped")  # the events that end a job, which are also states


@dataclass(frozen=True)
class JobStatus:
    """The state of a job (a key of `NEXT`), the reason for that state, and the next action."""

    state: str
    reason: str
    next: str


def job_status(run: str, job_id: str, record: JobState | None, events: Sequence[JobEvent]) -> JobStatus:
    """Derive the status of a job from SLURM's record and from the job's own events.

    Args:
        run: the run folder, quoted for a shell.
        job_id: id of the job.
        record: SLURM's record of the job; None if SLURM no longer knows the job.
        events: events of this job, oldest first.
    """
    state = _state(record, events)
    return JobStatus(state, _reason(state, record, events), NEXT[state].format(run=run, job=job_id))


def local_status(run: str, events: Sequence[JobEvent], active: bool, complete: bool) -> JobStatus:
    """Derive the status of a run that was started without SLURM.

    Args:
        run: the run folder, quoted for a shell.
        events: events of the run without SLURM, oldest first; none if it was started by hand.
        active: True if a process trains in the run folder.
        complete: True if the last step of the run is done.
    """
    if events and (events[-1].event != "started" or events[-1].task in _NOT_TRAINING):
        state = _state_by_events(events)
    else:
        state = "running" if active else "finished" if complete else "interrupted"
    action = NEXT[state].replace(_RESUME, _RESUME_LOCALLY).replace(" --job", "").format(run=run, job=LOCAL)
    return JobStatus(state, "" if state == "interrupted" else _reason(state, None, events), action)


def explain_exit_code(code: int) -> str:
    """Explain an exit code in words: `7` -> `exit code 7: accelerator memory is full`."""
    if code > SIGNAL_CODE:
        return f"ended by signal {code - SIGNAL_CODE}"
    meaning = _EXIT_CODE_MEANING.get(ExitCode(code)) if code in list(ExitCode) else None
    return f"exit code {code}: {meaning}" if meaning else f"exit code {code}"


def _state(record: JobState | None, events: Sequence[JobEvent]) -> str:
    if record is None:
        return _state_by_events(events)
    if record.waits:
        return _state_in_queue(record, events)
    if record.runs:
        return _STATE_OF_SLURM_STATE.get(record.state, "running")
    if record.state.startswith("CANCELLED"):
        return "dependency failed" if "Dependency" in record.reason else "cancelled"
    return _STATE_OF_SLURM_STATE.get(record.state) or _state_by_exit_code(record.exit_code)


def _state_by_events(events: Sequence[JobEvent]) -> str:
    """Return the state of a job that SLURM no longer knows, or that ran without SLURM."""
    ends = [event for event in events if event.event in _ENDS]
    if not ends or events[-1].event == "started":
        return "running" if events and events[-1].job_id == LOCAL else "forgotten"
    return _state_by_exit_code(ends[-1].code) if ends[-1].code else ends[-1].event


def _state_in_queue(record: JobState, events: Sequence[JobEvent]) -> str:
    if "NeverSatisfied" in record.reason:
        return "dependency failed"
    if "Held" in record.reason or record.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
        return "held"
    started_before = bool(record.restarts) or any(event.event == "started" for event in events)
    return "requeued" if started_before else "queued"


def _state_by_exit_code(code: int) -> str:
    known = ExitCode(code) if code in list(ExitCode) else ExitCode.FAILURE
    return _STATE_OF_EXIT_CODE.get(known, "failed")


def _reason(state: str, record: JobState | None, events: Sequence[JobEvent]) -> str:
    if state in ("running", "ending", "finished"):
        return ""
    logged = [event.reason for event in events if event.reason]
    if logged:
        return logged[-1]
    if record is None:
        return ""
    if record.exit_code and record.reason in ("", "NonZeroExitCode"):
        return explain_exit_code(record.exit_code)
    return record.reason
