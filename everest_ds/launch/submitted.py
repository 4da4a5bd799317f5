"""Queue a job and leave in its run folder what is needed to find it again and to queue it once more."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from everest_ds.errors import RunFolderError
from everest_ds.launch.job_log import JobEvent, append_event
from everest_ds.launch.sbatch import BatchJob, Shape
from everest_ds.launch.slurm import submit


def queue(job: BatchJob, command: str, runs: Mapping[str, Path], home: Path | None) -> str:
    """Submit the job; returns its id.

    Args:
        command: pretrain, finetune, ...: what the log calls the job.
        runs: suffix of the job's id ("" or "_4") -> run folder that logs it.
        home: where the job is written down for `requeue`; None: nowhere.

    Raises:
        UsageError: SLURM refuses it.
        RunFolderError: a folder cannot be written.
    """
    try:
        for folder in [*runs.values(), *([job.logs] if job.logs else [])]:
            folder.mkdir(parents=True, exist_ok=True)
        if home is not None:
            _file(home, command).write_text(_as_json(job))
    except OSError as error:
        raise RunFolderError("cannot write the run folder", given=str(error)) from None
    asked = time.time()  # the job may start, and say so, before sbatch returns
    job_id = submit(job)
    for suffix, run in runs.items():
        event = JobEvent("submitted", f"{job_id}{suffix}", nodes=None, task=command, seconds=asked)
        append_event(run, event)
    return job_id


def load_job(home: Path, command: str) -> tuple[BatchJob, Path]:
    """The job as `queue` wrote it down, and the folder that its relative names were meant from.

    Raises:
        RunFolderError: there is none.
    """
    file = _file(home, command)
    try:
        row = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{home}: no job was submitted from here",
            given=str(error),
            fix="send it again as it was sent, or use everest-ds submit",
        ) from None
    folder = Path(row.pop("folder"))
    job = BatchJob(
        **{
            **row,
            "script": Path(row["script"]),
            "arguments": tuple(row["arguments"]),
            "shape": Shape(**row["shape"]),
            "logs": Path(row["logs"]) if row["logs"] else None,
            "options": tuple(row["options"]),
        }
    )
    return job, folder


def _file(home: Path, command: str) -> Path:
    return home / f"submit-{command}.json"


def _as_json(job: BatchJob) -> str:
    return json.dumps({**asdict(job), "folder": str(Path.cwd())}, indent=2, default=str) + "\n"
