"""The event log of a run's jobs: one JSON object per line in `jobs.jsonl` of the run folder.

`everest-ds submit` writes the first line of a job, and the job itself writes the others. `everest-ds jobs`
reads them.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from everest_ds.durable_files import append_row, read_json_rows

EVENTS_FILE = "jobs.jsonl"

EventKind = Literal["submitted", "started", "stopped", "requeued", "finished", "failed"]


@dataclass(frozen=True)
class JobEvent:
    """One event in the life of a job of this run.

    Attributes:
        restarts: starts of the job before this one (SLURM_RESTART_COUNT).
        step: last completed optimiser step.
        nodes: all nodes of the job when it started; the nodes at fault when it failed.
        code: exit code of the rank that failed.
        task: command of the job, such as pretrain; a run can have jobs of several commands.
        seconds: time of the event, in seconds since the Unix epoch.
    """

    event: EventKind
    job_id: str
    restarts: int = 0
    step: int | None = None
    reason: str | None = None
    nodes: str | None = None
    code: int | None = None
    task: str | None = None
    seconds: float = field(default_factory=time.time)


_FIELDS = [each.name for each in fields(JobEvent)]


def append_event(run: Path, event: JobEvent) -> None:
    """Append one event to the log.

    Raises:
        OSError: if it could not be written whole.
    """
    append_row(run / EVENTS_FILE, asdict(event))


def read_events(run: Path) -> list[JobEvent]:
    """Return all events of a run, oldest first, without lines that a crash or a full disk cut off.

    Fields that another version of this package wrote are left out.
    """
    rows = read_json_rows(run / EVENTS_FILE).rows
    return [
        JobEvent(**{name: row[name] for name in _FIELDS if name in row})
        for row in rows
        if isinstance(row.get("event"), str) and isinstance(row.get("job_id"), str)
        if isinstance(row.get("restarts", 0), int) and isinstance(row.get("seconds", 0.0), int | float)
    ]
