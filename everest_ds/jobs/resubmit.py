"""The record of a submitted job in its run folder, from which the job can be submitted again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from everest_ds.durable_files import replace_file
from everest_ds.errors import RunFolderError
from everest_ds.jobs.chain import dependency_on
from everest_ds.jobs.events import JobEvent, append_event
from everest_ds.jobs.job_table import JobRow
from everest_ds.jobs.sbatch import BatchJob, JobShape
from everest_ds.jobs.slurm import submit_job


def keep_job(home: Path, command: str, job: BatchJob) -> None:
    """Record a job in the folder that it is submitted for, so that `load_job` can read it.

    Raises:
        OSError: if the folder cannot be written.
    """
    row = {**asdict(job), "folder": str(Path.cwd())}
    replace_file(_file(home, command), json.dumps(row, indent=2, default=str) + "\n")


def load_job(home: Path, command: str) -> tuple[BatchJob, Path]:
    """Read the job that `keep_job` recorded, and the folder to which its relative paths refer.

    The record names a script and its environment, so it is code: only its owner may run it.

    Raises:
        RunFolderError: if the folder holds no readable record of such a job, or that of another user.
    """
    file = _file(home, command)
    try:
        with open(file) as stream:
            owner, row = os.fstat(stream.fileno()).st_uid, json.load(stream)
        folder = Path(row.pop("folder"))
        job = BatchJob(
            **{
                **row,
                "script": Path(row["script"]),
                "arguments": tuple(row["arguments"]),
                "shape": JobShape(**row["shape"]),
                "logs": Path(row["logs"]) if row["logs"] else None,
                "options": tuple(row["options"]),
            }
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{home}: no readable record of a submitted {command} job",
            given=f"{type(error).__name__}: {error}",
            fix="submit the job again with everest-ds submit",
        ) from None
    if owner != os.geteuid():
        raise RunFolderError(
            f"{file}: belongs to another user, whose script and environment the job would run",
            given=f"user id {owner}",
            allowed=f"your user id, {os.geteuid()}",
            fix=f"read it, then submit the job yourself: everest-ds submit {command} {home}",
        )
    return job, folder


def submit_again(row: JobRow, before: Sequence[str] = ()) -> str:
    """Submit an ended job again from its record, and return the id of the new job.

    Args:
        row: the ended job; for a run of a sweep, only its task of the array job is submitted.
        before: ids of the jobs of a chain before it, for which the new job waits.

    Raises:
        RunFolderError: if the run folder holds no readable record of the job.
        UsageError: if SLURM rejects the job.
    """
    task = row.job_id.partition("_")[2] if row.home != row.run else None
    job, folder = load_job(row.home, "sweep" if task else row.task)
    seconds = time.time()  # taken now, because the job may start and log events before sbatch returns
    job = replace(job, dependency=dependency_on(before, row.task), array=task)
    job_id = submit_job(job, folder) + (f"_{task}" if task else "")
    append_event(row.run, JobEvent("submitted", job_id, task=row.task, seconds=seconds))
    return job_id


def _file(home: Path, command: str) -> Path:
    return home / f"submit-{command}.json"
