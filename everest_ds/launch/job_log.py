"""What became of a run's SLURM jobs: events, one JSON object a line, in the run folder's `jobs.jsonl`.

`everest-ds submit` writes the first line, the job itself the others; `everest-ds jobs` reads them.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

FILE_NAME = "jobs.jsonl"

Event = Literal["submitted", "started", "stopped", "requeued", "finished", "failed"]


@dataclass(frozen=True)
class JobEvent:
    """One thing that happened to a job of this run.

    `restarts` counts the starts before this one (SLURM_RESTART_COUNT); `step` is the last step that was done;
    `nodes` are those of the job when it started, and those to blame when it failed; `code` is the exit code
    of a rank that failed; `task` is the command of the job, of which a run can have several.
    """

    event: Event
    job_id: str
    restarts: int = 0
    step: int | None = None
    reason: str | None = None
    nodes: str | None = None
    code: int | None = None
    task: str | None = None
    seconds: float = field(default_factory=time.time)


def append_event(run: Path, event: JobEvent) -> None:
    """Add one line, whole even if several processes write at once."""
    line = json.dumps(asdict(event)) + "\n"
    file = os.open(run / FILE_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read_events(run: Path) -> list[JobEvent]:
    """All events, oldest first; a last line that a crash cut short is left out."""
    file = run / FILE_NAME
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [JobEvent(**json.loads(line)) for line in lines if line]
