"""The status of a job, its reason and the next action, derived from SLURM's state and the run's event log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everest_ds.errors import ExitCode
from everest_ds.jobs.events import JobEvent
from everest_ds.jobs.slurm_state import JobState

LOCAL = "local"  # the id of a job that runs without SLURM
_GO_ON = "`everest-ds requeue {run}` resumes from the newest checkpoint"
_READ_LOGS = "`everest-ds logs {run} --job` shows the cause; correct it, then submit again"

# State -> next action; {run} and {job} are filled in.
NEXT = {
    "queued": "wait; `squeue --start --jobs={job}` shows the expected start",
    "held": "`scontrol release {job}`",
    "requeued": "nothing: SLURM restarts the job, which resumes from its newest checkpoint",
    "running": "`everest-ds logs {run} -f`",
    "ending": "nothing: SLURM is releasing the job's nodes",
    "finished": "`everest-ds report {run}`",
    "stopped": _GO_ON,
    "preempted": _GO_ON,
    "node failure": f"{_GO_ON}; add --exclude=NODE to submit if a node fails again",
    "time limit": f"{_GO_ON}; if nothing was saved, submit with --signal=USR1@600",
    "cancelled": _GO_ON,
    "rank lost": f"{_GO_ON}; `everest-ds logs {{run}} --job` names the rank",
    "out of memory": "submit again with a lower batch.micro_batch_size, or with recompute.mode=attention",
    "out of host memory": "submit again with fewer data.num_workers, or with more --mem",
    "bad node": f"{_GO_ON}; report the node to its administrators, or exclude it with --exclude",
    "too many restarts": "remove the cause, then `everest-ds requeue {run}`",
    "diverged": "lower schedule.base_lr or set optimizer.clip_grad_norm, in another run.dir",
    "dependency failed": "correct the job that this one depends on, then submit again",
    "failed": _READ_LOGS,
    "forgotten": "SLURM no longer knows the job; `everest-ds requeue {run}` submits it again",
}

_OF_SLURM = {
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
_OF_EXIT_CODE = {
    ExitCode.STOPPED: "stopped",
    ExitCode.OUT_OF_MEMORY: "out of memory",
    ExitCode.RANK_LOST: "rank lost",
    ExitCode.DIVERGED: "diverged",
    ExitCode.BAD_NODE: "bad node",
    ExitCode.RESTARTS: "too many restarts",
}
_MEANING = {
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
_OF_LAST_EVENT = {"finished": "finished", "failed": "failed", "stopped": "stopped"}


@dataclass(frozen=True)
class JobStatus:
    """The state of a job (a key of `NEXT`), the reason for that state, and the next action."""

    state: str
    reason: str
    next: str


def job_status(run: str, job_id: str, state: JobState | None, events: Sequence[JobEvent]) -> JobStatus:
    """Derive the status of a job from SLURM's record and from the job's own events.

    Args:
        run: the run folder, quoted for a shell.
        job_id: id of the job.
        state: SLURM's record of the job; None if SLURM no longer knows the job.
        events: events of this job, oldest first.
    """
    word = _word(state, events)
    return JobStatus(word, _reason(word, state, events), NEXT[word].format(run=run, job=job_id))


def explain_exit_code(code: int) -> str:
    """Explain an exit code in words: `7` -> `exit code 7: accelerator memory is full`."""
    if code > 128:
        return f"ended by signal {code - 128}"
    meaning = _MEANING.get(ExitCode(code)) if code in list(ExitCode) else None
    return f"exit code {code}: {meaning}" if meaning else f"exit code {code}"


def _word(state: JobState | None, events: Sequence[JobEvent]) -> str:
    if state is None:
        return _of_events(events)
    if state.waits:
        return _waiting(state, events)
    if state.runs:
        return _OF_SLURM.get(state.state, "running")
    if state.state.startswith("CANCELLED"):
        return "dependency failed" if "Dependency" in state.reason else "cancelled"
    return _OF_SLURM.get(state.state) or _OF_EXIT_CODE.get(_as_exit_code(state.exit_code), "failed")


def _of_events(events: Sequence[JobEvent]) -> str:
    """Return the state of a job that SLURM no longer knows, or that ran without SLURM, from its events."""
    ends = [event for event in events if event.event in _OF_LAST_EVENT]
    if not ends or events[-1].event == "started":
        return "running" if events and events[-1].job_id == LOCAL else "forgotten"
    code = ends[-1].code
    return _OF_EXIT_CODE.get(_as_exit_code(code), "failed") if code else _OF_LAST_EVENT[ends[-1].event]


def _waiting(state: JobState, events: Sequence[JobEvent]) -> str:
    if "NeverSatisfied" in state.reason:
        return "dependency failed"
    if "Held" in state.reason or state.state in ("REQUEUE_HOLD", "SPECIAL_EXIT"):
        return "held"
    started_before = bool(state.restarts) or any(event.event == "started" for event in events)
    return "requeued" if started_before else "queued"


def _reason(word: str, state: JobState | None, events: Sequence[JobEvent]) -> str:
    told = [event.reason for event in events if event.reason]
    if told and word not in ("running", "ending", "finished"):
        return told[-1]
    if state is None or word in ("running", "ending", "finished"):
        return ""
    if state.exit_code and state.reason in ("", "NonZeroExitCode"):
        return explain_exit_code(state.exit_code)
    return state.reason


def _as_exit_code(code: int) -> ExitCode:
    return ExitCode(code) if code in list(ExitCode) else ExitCode.FAILURE
