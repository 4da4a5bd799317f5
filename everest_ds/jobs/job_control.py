"""Stopping and restarting the jobs of runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from everest_ds.errors import UsageError
from everest_ds.jobs.job_table import JobRow
from everest_ds.jobs.resubmit import submit_again
from everest_ds.jobs.slurm import call
from everest_ds.training.stop import KILL_FILE


def stop_job(row: JobRow, now: bool = False) -> str:
    """Stop a job for good, and describe how it stops.

    A running job that trains saves a checkpoint first, unless `now` is true. A waiting job leaves the queue.

    Raises:
        UsageError: if SLURM refuses to cancel the job, or a job without SLURM is to stop at once.
    """
    if row.is_over:
        return f"has already ended: {row.status.state}"
    if (row.slurm is None or row.slurm.runs) and row.trains and not now:
        (row.run / KILL_FILE).touch()
        return "saves at its next step and then stops (--now stops it at once)"
    if row.slurm is None:
        raise UsageError(
            f"{row.run}: this run was started without SLURM",
            fix="leave out --now, or press Ctrl-C where it runs",
        )
    call(["scancel", row.job_id])
    return "cancelled"


def restart_jobs(rows: Sequence[JobRow], report: Callable[[str], None]) -> None:
    """Restart jobs one after another from their newest checkpoints.

    An ended job is submitted again. If several ended jobs belong to one run, each waits for the one before.

    Args:
        rows: the jobs.
        report: receives one line for each job, which says how the job restarts.

    Raises:
        RunFolderError: if the run folder of an ended job holds no readable record of the job.
        UsageError: if SLURM refuses to restart a job.
    """
    again: defaultdict[Path, list[str]] = defaultdict(list)
    for row in rows:
        (row.run / KILL_FILE).unlink(missing_ok=True)  # left over: the run ended before it saw this file
        if row.is_over:
            again[row.run].append(submit_again(row, again[row.run]))
            how = f"submitted again as job {again[row.run][-1]}"
        elif row.status.state == "held":
            call(["scontrol", "release", row.job_id])
            how = "released"
        elif row.slurm is None:
            how = "already runs, without SLURM"
        elif row.slurm.waits:
            how = "already waits in the queue"
        else:
            call(["scontrol", "requeue", row.job_id])
            how = "requeued"
        report(f"{row.job_id}: {how}")
