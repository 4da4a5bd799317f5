"""Submission of jobs, with a record in the run folder from which `everest-ds requeue` submits them again."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from everest_ds.errors import RunFolderError
from everest_ds.jobs.events import JobEvent, append_event
from everest_ds.jobs.sbatch import BatchJob, JobShape
from everest_ds.jobs.slurm import submit_job


def queue(job: BatchJob, command: str, runs: Mapping[str, Path], home: Path | None) -> str:
    """Submit a job, record it in its run folders, and return its id.

    Args:
        job: arguments of the sbatch call.
        command: command of the job in the event log, such as pretrain or finetune.
        runs: suffix of the job's id ("" or "_4") -> run folder that logs the event.
        home: folder that records the job for `requeue`; None for no record.

    Raises:
        UsageError: if SLURM rejects the job.
        RunFolderError: if a folder cannot be written.
    """
    try:
        for folder in [*runs.values(), *([job.logs] if job.logs else [])]:
            folder.mkdir(parents=True, exist_ok=True)
        if home is not None:
            _file(home, command).write_text(_as_json(job))
    except OSError as error:
        raise RunFolderError("the run folder cannot be written", given=str(error)) from None
    asked = time.time()  # taken now, because the job may start and log events before sbatch returns
    job_id = submit_job(job)
    for suffix, run in runs.items():
        event = JobEvent("submitted", f"{job_id}{suffix}", nodes=None, task=command, seconds=asked)
        append_event(run, event)
    return job_id


def load_job(home: Path, command: str) -> tuple[BatchJob, Path]:
    """Read the job that `queue` recorded, and the folder to which its relative paths refer.

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


def _as_json(job: BatchJob) -> str:
    return json.dumps({**asdict(job), "folder": str(Path.cwd())}, indent=2, default=str) + "\n"
