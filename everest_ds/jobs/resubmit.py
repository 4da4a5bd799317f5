"""Submission of jobs, with a record in the run folder from which `everest-ds requeue` submits them again."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from everest_ds.errors import RunFolderError
from everest_ds.jobs.sbatch import BatchJob, JobShape


def keep_job(home: Path, command: str, job: BatchJob) -> None:
    """Record a job in the folder that it is submitted for, so that `load_job` can read it.

    Raises:
        OSError: if the folder cannot be written.
    """
    row = {**asdict(job), "folder": str(Path.cwd())}
    _file(home, command).write_text(json.dumps(row, indent=2, default=str) + "\n")


def load_job(home: Path, command: str) -> tuple[BatchJob, Path]:
    """Read the job that `keep_job` recorded, and the folder to which its relative paths refer.

    Raises:
        RunFolderError: if the folder holds no readable record of such a job.
    """
    file = _file(home, command)
    try:
        row = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{home}: no readable record of a submitted {command} job",
            given=str(error),
            fix="submit the job again with everest-ds submit",
        ) from None
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
    return job, folder


def _file(home: Path, command: str) -> Path:
    return home / f"submit-{command}.json"
