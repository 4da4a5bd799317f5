"""SLURM's records of jobs, read from squeue, or from sacct for jobs that squeue no longer lists.

Only fields without free text are requested, so that a job's name cannot be mistaken for another field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from everest_ds.errors import ExitCode, UsageError
from everest_ds.jobs.slurm import answer, call, has_slurm

_SQUEUE = "JobArrayID JobID State exit_code RestartCnt TimeUsed NumNodes NodeList Reason".split()
_SACCT = "JobID JobIDRaw State ExitCode Elapsed NNodes NodeList Reason".split()
_JOB_ID = re.compile(r"[0-9]{1,18}(_[0-9]{1,18})?")
SIGNAL_CODE = 128  # a shell reports signal n as exit code 128 + n
# Job ids in one call, because the length of a command line is limited.
_AT_ONCE = 500


@dataclass(frozen=True)
class JobState:
    """SLURM's record of one job.

    Attributes:
        job_id: `123`, or `123_4` for task 4 of an array.
        raw_id: SLURM_JOB_ID inside the job; differs from `job_id` in arrays.
        state: SLURM's state in full: PENDING, RUNNING, OUT_OF_MEMORY, ...
        exit_code: exit code of the batch script; 128 + n if signal n ended it.
        restarts: number of times that the job was requeued; None if unknown.
        elapsed: run time in SLURM's format, such as 1-02:03:04.
        num_nodes: number of allocated or requested nodes.
        nodes: allocated nodes in SLURM's node-list notation; "" while the job is pending.
        reason: SLURM's reason why the job waits or ended; "" without one.
    """

    job_id: str
    raw_id: str
    state: str
    exit_code: int = 0
    restarts: int | None = None
    elapsed: str = ""
    num_nodes: int = 0
    nodes: str = ""
    reason: str = ""

    @property
    def waits(self) -> bool:
        """True if the job is in the queue, for its first start or for a restart."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")

    @property
    def runs(self) -> bool:
        """True if the job occupies nodes."""
        return self.state in ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING")

    @property
    def is_over(self) -> bool:
        """True if the job has ended and SLURM will not start it again."""
        return not (self.waits or self.runs)

    @property
    def outcome(self) -> int:
        """The exit code of a job that has ended: 0 if it finished, else not 0, even if it was cancelled."""
        return ExitCode.OK if self.state == "COMPLETED" else self.exit_code or ExitCode.FAILURE


def is_job_id(text: str) -> bool:
    """Return whether the text has the format of a SLURM job id, such as `123` or `123_4`."""
    return _JOB_ID.fullmatch(text) is not None


def query_jobs(job_ids: Iterable[str]) -> dict[str, JobState]:
    """Ask SLURM for the state of these jobs, and return the states by job id and by raw id.

    Jobs that SLURM no longer knows are left out.

    Raises:
        UsageError: if the controller does not answer.
    """
    wanted = sorted({job_id for job_id in job_ids if is_job_id(job_id)})
    found: dict[str, JobState] = {}
    for first in range(0, len(wanted), _AT_ONCE):
        _add(found, _ask_squeue(wanted[first : first + _AT_ONCE]))
    missing = [job_id for job_id in wanted if job_id not in found]
    for first in range(0, len(missing), _AT_ONCE):
        asked = f"--jobs={','.join(missing[first : first + _AT_ONCE])}"
        words = ["sacct", "-n", "-P", "-X", asked, f"--format={','.join(_SACCT)}"]
        _add(found, parse_sacct(answer(words) or ""))
    return found


def parse_squeue(text: str) -> list[JobState]:
    """Parse the output of `squeue -O` with the fields of `_SQUEUE`."""
    states = []
    for line in text.splitlines():
        fields = line.split("|", len(_SQUEUE) - 1)
        if len(fields) == len(_SQUEUE):
            job_id, raw, state, code, restarts, elapsed, count, nodes, reason = (f.strip() for f in fields)
            status = int(code or 0)  # as waitpid reports it
            states.append(
                JobState(
                    job_id,
                    raw,
                    state,
                    _exit_code(status >> 8, status & 0x7F),
                    int(restarts or 0),
                    elapsed,
                    int(count or 0),
                    "" if state == "PENDING" else nodes,
                    "" if reason == "None" else reason,
                )
            )
    return states


def parse_sacct(text: str) -> list[JobState]:
    """Parse the output of `sacct -P -n -X` with the fields of `_SACCT`.

    For a requeued job sacct reports the last start.
    """
    states = []
    for line in text.splitlines():
        fields = line.split("|", len(_SACCT) - 1)
        if len(fields) == len(_SACCT):
            job_id, raw, state, code, elapsed, count, nodes, reason = (f.strip() for f in fields)
            exit_code, _, signal = code.partition(":")
            states.append(
                JobState(
                    job_id,
                    raw,
                    state.split(" ")[0],  # sacct appends the user: "CANCELLED by 1000"
                    _exit_code(int(exit_code or 0), int(signal or 0)),
                    None,
                    elapsed,
                    int(count or 0),
                    "" if nodes == "None assigned" else nodes,
                    "" if reason == "None" else reason,
                )
            )
    return states


def _ask_squeue(job_ids: Sequence[str]) -> list[JobState]:
    fields = ",".join(f"{name}:|" for name in _SQUEUE[:-1]) + f",{_SQUEUE[-1]}:"
    words = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(job_ids)}", "-O", fields]
    if not has_slurm():
        return []
    try:
        return parse_squeue(call(words))
    except UsageError as error:
        if "Invalid job id" in str(error):  # squeue no longer knows any of the jobs
            return []
        raise


def _add(found: dict[str, JobState], states: Sequence[JobState]) -> None:
    for state in states:
        found[state.job_id] = state
    for state in states:
        # A job id takes precedence, because the id of an array is also the raw id of its last task.
        found.setdefault(state.raw_id, state)


def _exit_code(code: int, signal: int) -> int:
    return SIGNAL_CODE + signal if signal else code
