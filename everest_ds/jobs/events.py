"""The event log of a run's jobs: one JSON object per line in `jobs.jsonl` of the run folder.

`everest-ds submit` writes the first line of a job, and the job itself writes the others. `everest-ds jobs`
reads them.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

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


def append_event(run: Path, event: JobEvent) -> None:
    """Append one event as a single write, so that lines of concurrent processes do not mix."""
    line = json.dumps(asdict(event)) + "\n"
    file = os.open(run / EVENTS_FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read_events(run: Path) -> list[JobEvent]:
    """Return all events of a run, oldest first, without a last line that a crash cut short."""
    file = run / EVENTS_FILE
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [JobEvent(**json.loads(line)) for line in lines if line]
