"""What SLURM says of jobs: from squeue while it remembers them, from sacct where accounting does.

Only fields without free text are asked for, so that no job's name can be taken for another field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from everest_ds.errors import UsageError
from everest_ds.launch.slurm import answer, call, has_slurm

_SQUEUE = "JobArrayID JobID State exit_code RestartCnt TimeUsed NumNodes NodeList Reason".split()
_SACCT = "JobID JobIDRaw State ExitCode Elapsed NNodes NodeList Reason".split()
_JOB_ID = re.compile(r"[0-9]{1,18}(_[0-9]{1,18})?")
_SIGNAL_CODE = 128
# Ids of one call: a command line has an end.
_AT_ONCE = 500


@dataclass(frozen=True)
class JobState:
    """One job, as SLURM tells it.

    Attributes:
        job_id: `123`, or `123_4` for task 4 of an array.
        raw_id: what the job itself sees as SLURM_JOB_ID; differs from `job_id` in arrays.
        state: SLURM's word in full: PENDING, RUNNING, OUT_OF_MEMORY, ...
        exit_code: of the batch script; 128 + n if signal n ended it.
        restarts: times that it was requeued; None where not told.
        reason: SLURM's, of waiting or of the end; "" without one.
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
        """Queued, or requeued."""
        return self.state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")

    @property
    def runs(self) -> bool:
        """Holds nodes."""
        return self.state in ("RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING")

    @property
    def is_over(self) -> bool:
        """Will do nothing more by itself."""
        return not (self.waits or self.runs)


def is_job_id(text: str) -> bool:
    """Whether SLURM could have given this id."""
    return _JOB_ID.fullmatch(text) is not None


def query_jobs(job_ids: Iterable[str]) -> dict[str, JobState]:
    """What SLURM knows of these jobs, under both ids of each; those it has forgotten are left out.

    Raises:
        UsageError: the controller does not answer.
    """
    wanted = sorted({job_id for job_id in job_ids if is_job_id(job_id)})
    found: dict[str, JobState] = {}
    for first in range(0, len(wanted), _AT_ONCE):
        _add(found, _ask_squeue(wanted[first : first + _AT_ONCE]))
    missing = [job_id for job_id in wanted if job_id not in found]
    for first in range(0, len(missing), _AT_ONCE):
        _add(found, _ask_sacct(missing[first : first + _AT_ONCE]))
    return found


def parse_squeue(text: str) -> list[JobState]:
    """Lines of `squeue -O` with the fields asked for here."""
    states = []
    for line in text.splitlines():
        fields = line.split("|", len(_SQUEUE) - 1)
        if len(fields) == len(_SQUEUE):
            job_id, raw, state, code, restarts, elapsed, count, nodes, reason = (f.strip() for f in fields)
            seen = None if state == "PENDING" else nodes
            states.append(
                JobState(
                    job_id,
                    raw,
                    state,
                    _from_wait_status(int(code or 0)),
                    int(restarts or 0),
                    elapsed,
                    int(count or 0),
                    seen or "",
                    "" if reason == "None" else reason,
                )
            )
    return states


def parse_sacct(text: str) -> list[JobState]:
    """Lines of `sacct -P -n -X` with the fields asked for here; of a requeued job its last start counts."""
    states = []
    for line in text.splitlines():
        fields = line.split("|", len(_SACCT) - 1)
        if len(fields) == len(_SACCT):
            job_id, raw, state, code, elapsed, count, nodes, reason = (f.strip() for f in fields)
            states.append(
                JobState(
                    job_id,
                    raw,
                    state.split(" ")[0],  # "CANCELLED by 1000"
                    _from_pair(code),
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
        if "Invalid job id" in str(error):  # it has forgotten all of them
            return []
        raise


def _ask_sacct(job_ids: Sequence[str]) -> list[JobState]:
    words = ["sacct", "-n", "-P", "-X", f"--jobs={','.join(job_ids)}", f"--format={','.join(_SACCT)}"]
    return parse_sacct(answer(words) or "")


def _add(found: dict[str, JobState], states: Sequence[JobState]) -> None:
    for state in states:
        found[state.job_id] = state
    for state in states:
        found.setdefault(state.raw_id, state)  # an array's own id is also the raw id of its last task


def _from_wait_status(status: int) -> int:
    signal = status & 0x7F
    return _SIGNAL_CODE + signal if signal else status >> 8


def _from_pair(code: str) -> int:
    exit_code, _, signal = code.partition(":")
    return _SIGNAL_CODE + int(signal) if signal not in ("", "0") else int(exit_code or 0)
