"""The jobs of run folders as rows: SLURM's job state, the job's own events and the run's progress."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yaml import YAMLError

from everest_ds.checkpoints.names import newest_step
from everest_ds.config.yaml_tree import ConfigTree, parse_yaml
from everest_ds.durable_files import parse_json_rows
from everest_ds.errors import UsageError
from everest_ds.jobs.events import EVENTS_FILE, JobEvent, read_events
from everest_ds.jobs.slurm_state import JobState, is_job_id, query_jobs
from everest_ds.jobs.status import LOCAL, JobStatus, job_status, local_status
from everest_ds.jobs.sweep_file import SWEEP_FILE
from everest_ds.training.run_folder import (
    CONFIG_FILE,
    ENVIRONMENT_FILE,
    EVALUATION_FILE,
    METRICS_FILE,
    RunFolder,
)
from everest_ds.units import GIB

RUNS = Path("runs")  # the folder in which jobs are looked up by their number
# Subfolders of a run that hold many files and never another run: skipping them keeps the search fast.
_NOT_SEARCHED = frozenset({"checkpoints", "tensorboard", "logs"})
_DEEPEST = 6  # levels of subfolders that are searched for runs
_TAIL_BYTES = 256 * 1024
_TRAINING = ("pretrain", "finetune")
_SECTIONS = re.compile(r"^(?:task|schedule|run):.*\n(?:[ -].*\n)*", re.MULTILINE)


@dataclass(frozen=True)
class Progress:
    """The progress of a run; a figure is None until the run has reported it."""

    step: int | None = None
    total_steps: int | None = None
    loss: float | None = None
    top1: float | None = None
    clips_per_s: float | None = None
    memory_gib: float | None = None

    @property
    def share(self) -> float | None:
        """The share of the steps that are done, 0 to 1."""
        return self.step / self.total_steps if self.step is not None and self.total_steps else None


@dataclass(frozen=True)
class JobRow:
    """One job of one run: its SLURM state, its events, its progress and its status."""

    run: Path
    job_id: str
    task: str
    slurm: JobState | None
    events: tuple[JobEvent, ...]
    progress: Progress
    status: JobStatus

    @property
    def restarts(self) -> int:
        """The number of times that the job was restarted."""
        known = self.slurm.restarts if self.slurm else None
        return max([known or 0, *(event.restarts for event in self.events)])

    @property
    def is_over(self) -> bool:
        """True if the job has ended and SLURM will not start it again."""
        return self.slurm.is_over if self.slurm else self.status.state != "running"

    @property
    def trains(self) -> bool:
        """True if the job trains and can save checkpoints, or if its task is unknown (a plain sbatch)."""
        return self.task in (*_TRAINING, "sweep", "")

    @property
    def home(self) -> Path:
        """The folder that the job was submitted for: the folder of the run, or of its sweep."""
        return self.run.parent if (self.run.parent / SWEEP_FILE).is_file() else self.run

    @property
    def output(self) -> Path:
        """The file that receives the output of the job; without SLURM, the log of rank 0."""
        if self.job_id == LOCAL:
            return self.run / "logs" / "rank-0.log"
        file = self.home / "logs" / f"slurm-{self.job_id}.out"
        return file.with_name("slurm.out") if "\\" in str(file.absolute()) else file

    @property
    def log(self) -> Path:
        """The log to read first: that of rank 0 if the job trains, else the output of the job."""
        rank = self.run / "logs" / "rank-0.log"
        return rank if self.trains and rank.is_file() else self.output


def find_runs(folders: Iterable[Path]) -> list[Path]:
    """Find run folders at or below `folders`: those with an event log, and those of runs started by hand."""
    found: dict[Path, None] = {}
    for folder in folders:
        for place, below, files in os.walk(folder):
            depth = len(Path(place).parts) - len(folder.parts)
            below[:] = sorted(name for name in below if name not in _NOT_SEARCHED and depth < _DEEPEST)
            if EVENTS_FILE in files or (CONFIG_FILE in files and ENVIRONMENT_FILE in files):
                found[Path(place)] = None
    return list(found)


def find_jobs(names: Sequence[str]) -> list[JobRow]:
    """Return the jobs of the given run folders or job numbers.

    For a run folder, these are its live jobs, or else its unfinished jobs, or else its last job.

    Raises:
        UsageError: if there is no such run or job.
    """
    return [row for name in names for row in _find(name)]


def in_submission_order(rows: Sequence[JobRow]) -> list[JobRow]:
    """Sort jobs in the order of their submission, those without SLURM first."""
    return sorted(rows, key=lambda row: [int(part) for part in row.job_id.split("_") if part.isdecimal()])


def job_rows(runs: Sequence[Path]) -> list[JobRow]:
    """Return the live jobs and the last job of each task, in the order of `runs`.

    A run that was started by hand has one row, without events.
    """
    events = {run: _events_in_order(run) for run in runs}
    known = query_jobs(event.job_id for logged in events.values() for event in logged)
    return [row for run in runs for row in _rows_of(run, events[run], known)]


def read_progress(run: Path) -> Progress:
    """Read the progress of a run from the end of its metrics file; what is damaged in it is left out."""
    rows = [row for row in _last_rows(run / METRICS_FILE) if isinstance(row.get("step"), int)]
    steps = [row for row in rows if isinstance(row.get("loss"), int | float)]
    validated = [row["val_top1"] for row in rows if isinstance(row.get("val_top1"), int | float)]
    tested = _read_json(run / EVALUATION_FILE).get("top1")
    top1 = tested if isinstance(tested, int | float) else max(validated, default=None)
    if not steps:
        return Progress(top1=top1)
    last = steps[-1]
    return Progress(
        step=last["step"],
        total_steps=_total_steps(_settings(run), last),
        loss=last["loss"],
        top1=top1,
        clips_per_s=last.get("clips_per_s"),
        memory_gib=max(row.get("memory_bytes") or 0 for row in steps) / GIB,
    )


def _find(name: str) -> list[JobRow]:
    if Path(name).is_dir():
        rows = job_rows(find_runs([Path(name)]))
        live = [row for row in rows if not row.is_over]
        chosen = live or [row for row in rows if row.status.state != "finished"] or rows[-1:]
    elif is_job_id(name):
        rows = job_rows(find_runs([RUNS]))
        chosen = [row for row in rows if row.job_id == name or row.job_id.startswith(f"{name}_")]
    else:
        chosen = []
    if not chosen:
        raise UsageError("no such run or job", given=repr(name), fix="`everest-ds jobs` lists all jobs")
    return chosen


def _events_in_order(run: Path) -> list[JobEvent]:
    try:
        return sorted(read_events(run), key=lambda event: event.seconds)
    except OSError:  # the file of another user
        return []


def _rows_of(run: Path, events: Sequence[JobEvent], known: dict[str, JobState]) -> Iterator[JobRow]:
    jobs: dict[str, list[JobEvent]] = {}
    for event in events:
        state = known.get(event.job_id)
        jobs.setdefault(state.job_id if state else event.job_id, []).append(event)
    last_of_task = {_task(own_events): job_id for job_id, own_events in jobs.items()}
    progress = read_progress(run)
    live = [job_id for job_id in jobs if job_id in known and not known[job_id].is_over]
    active = not live and RunFolder(run).is_active
    if LOCAL not in jobs and (active or not jobs) and (run / ENVIRONMENT_FILE).is_file():
        yield _local_row(run, [], progress, active)
    for job_id, own_events in jobs.items():
        if job_id == LOCAL:
            yield _local_row(run, own_events, progress, active)
            continue
        task = _task(own_events)
        if job_id in live or last_of_task[task] == job_id:
            shown = progress if task in (*_TRAINING, "sweep", "") else Progress(top1=progress.top1)
            state = known.get(job_id)
            status = job_status(shlex.quote(str(run)), job_id, state, own_events)
            yield JobRow(run, job_id, task, state, tuple(own_events), shown, status)


def _local_row(run: Path, events: Sequence[JobEvent], progress: Progress, active: bool) -> JobRow:
    """Return the row of a run without SLURM; its state follows from its folder if it was started by hand."""
    task = _task(events) or str(_settings(run).get("task", ""))
    done = max(progress.step or 0, newest_step(run))
    complete = progress.total_steps is not None and done >= progress.total_steps
    status = local_status(shlex.quote(str(run)), events, active, complete)
    shown = progress if task in _TRAINING else Progress(top1=progress.top1)
    return JobRow(run, LOCAL, task, None, tuple(events), shown, status)


def _task(events: Sequence[JobEvent]) -> str:
    return next((event.task for event in events if event.task), "")


def _settings(run: Path) -> ConfigTree:
    """Read `task`, `schedule` and `run` of a run's config; parsing all of it takes five times as long."""
    try:
        tree = parse_yaml("".join(_SECTIONS.findall((run / CONFIG_FILE).read_text())))
    except (OSError, ValueError, YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _total_steps(settings: ConfigTree, last: dict[str, Any]) -> int | None:
    try:
        steps = settings["schedule"]["epochs"] * round(last["step"] / last["epoch"])
        limit = settings["run"].get("max_steps")
    except (KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None
    return min(steps, limit or steps) or None


def _last_rows(file: Path) -> list[dict[str, Any]]:
    """Read only the last rows of a metrics file, because the file of a long run is large."""
    try:
        with open(file, "rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, size - _TAIL_BYTES))
            return list(filter(None, parse_json_rows(stream)))
    except OSError:
        return []


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError):
        return {}
