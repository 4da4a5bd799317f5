"""`everest-ds jobs | cancel | requeue`: list the jobs of runs, stop them, and start them again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.console import write_json
from everest_ds.errors import UsageError
from everest_ds.jobs.slurm_state import is_job_id

if TYPE_CHECKING:
    from rich.console import Group

    from everest_ds.jobs.job_table import JobRow

Folders = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[FOLDER]...", help="Run folders, or folders that contain run folders. Default: runs."
    ),
]
Which = Annotated[list[str], typer.Argument(metavar="RUN|JOB...", help="Run folders or job numbers.")]
Now = Annotated[bool, typer.Option("--now", help="End jobs at once; the steps since the last save are lost.")]

RUNS = Path("runs")
_STYLES = {
    "running": "green",
    "finished": "bold green",
    "queued": "cyan",
    "requeued": "yellow",
    "stopped": "yellow",
    "ending": "yellow",
    "held": "yellow",
    "forgotten": "dim",
}


def jobs(folders: Folders = None, json_file: JsonFile = None) -> None:
    """List the jobs of runs: state, progress, loss, speed and restarts.

    Below the table, each job's state is explained, with what to do next and which log to read.

    Example: everest-ds jobs runs/first
    """
    from rich.console import Console

    from everest_ds.jobs.job_table import find_runs, job_rows

    rows = in_order(job_rows(find_runs(_folders(folders))))
    if rows:
        Console().print(jobs_table(rows))
    else:
        typer.echo("no jobs found; to queue one: everest-ds submit pretrain RECIPE")
    write_json(json_file, [_as_json(row) for row in rows])


def cancel(which: Which, now: Now = False) -> None:
    """Stop jobs for good: a running job first saves a checkpoint, a waiting job leaves the queue.

    Example: everest-ds cancel runs/first
    """
    from everest_ds.jobs.slurm import call
    from everest_ds.training.stop import KILL_FILE

    for row in find_rows(which):
        if row.is_over:
            typer.echo(f"{row.job_id}: has already ended: {row.verdict.state}")
        elif row.slurm is not None and row.slurm.runs and row.trains and not now:
            (row.run / KILL_FILE).touch()
            typer.echo(f"{row.job_id}: saves at its next step and then stops (--now stops it at once)")
        else:
            call(["scancel", row.job_id])
            typer.echo(f"{row.job_id}: cancelled")


def requeue(which: Which) -> None:
    """Restart jobs from their newest checkpoints. Running jobs are requeued, ended jobs are submitted again.

    Several unfinished jobs of a run (finetune, evaluate) are submitted so that each waits for the one before.

    Example: everest-ds requeue runs/first
    """
    from everest_ds.training.stop import KILL_FILE

    before: dict[Path, str] = {}
    for row in find_rows(which):
        (row.run / KILL_FILE).unlink(missing_ok=True)  # left over: the run ended before it saw this file
        if row.is_over:
            before[row.run] = _submit_again(row, before.get(row.run))
            typer.echo(f"{row.job_id}: submitted again as job {before[row.run]}")
        else:
            typer.echo(f"{row.job_id}: {_requeue(row)}")


def find_rows(which: Sequence[str]) -> list[JobRow]:
    """Return the jobs that each run folder or job number names.

    For a run folder these are its live jobs, or else its unfinished jobs, or else its last job.

    Raises:
        UsageError: there is no such run or job.
    """
    return [row for text in which for row in _find(text)]


def in_order(rows: Sequence[JobRow]) -> list[JobRow]:
    """Sort jobs in the order of their submission, those without SLURM first."""
    return sorted(rows, key=_number)


def jobs_table(rows: Sequence[JobRow]) -> Group:
    """Build the table of jobs and, below it, the reason, next action and log of each."""
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None)
    for name in ("job", "run", "task", "state", "progress"):
        table.add_column(name, overflow="fold", no_wrap=name != "run")
    for name in ("loss", "clips/s", "time", "restarts"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("nodes", overflow="fold")
    advice = Table.grid(padding=(0, 1, 0, 2))
    for row in rows:
        table.add_row(*_cells(row))
        advice.add_row(row.job_id, _advice(row))
    return Group(table, "", advice)


def _cells(row: JobRow) -> list[str]:
    from rich.markup import escape

    state, progress = row.slurm, row.progress
    return [
        row.job_id,
        escape(str(row.run)),
        row.task,
        _styled(row.verdict.state),
        _progress(row),
        "" if progress.loss is None else f"{progress.loss:.4f}",
        "" if progress.clips_per_s is None else f"{progress.clips_per_s:.1f}",
        state.elapsed if state else "",
        str(row.restarts),
        escape(state.nodes) if state else "",
    ]


def _advice(row: JobRow) -> str:
    from rich.markup import escape

    # The table shows only the fault of an error; its given, allowed and fix parts are in the log.
    reason = row.verdict.reason.partition("; given: ")[0]
    why = _styled(row.verdict.state) + (f": {escape(reason)}." if reason else ".")
    return f"{why} [bold]Next:[/bold] {escape(row.verdict.next)}  [dim]{escape(str(row.log))}[/dim]"


def _styled(state: str) -> str:
    style = _STYLES.get(state, "red")
    return f"[{style}]{state}[/{style}]"


def _progress(row: JobRow) -> str:
    progress = row.progress
    if progress.step is None:
        return "" if progress.top1 is None else f"top-1 {progress.top1:.1f} %"
    if progress.share is None:
        return f"step {progress.step}"
    filled = round(10 * progress.share)
    bar = f"[green]{'━' * filled}[/green][dim]{'━' * (10 - filled)}[/dim]"
    return f"{bar} {progress.step} of {progress.total_steps}"


def _as_json(row: JobRow) -> dict[str, Any]:
    return {
        "run": str(row.run),
        "job": row.job_id,
        "task": row.task,
        "state": row.verdict.state,
        "reason": row.verdict.reason,
        "next": row.verdict.next,
        "restarts": row.restarts,
        "slurm": row.slurm and vars(row.slurm),
        "progress": vars(row.progress),
        "log": str(row.log),
        "events": [{**vars(event), "time": _local_time(event.seconds)} for event in row.events],
    }


def _local_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def _folders(given: Sequence[Path] | None) -> list[Path]:
    missing = [folder for folder in given or [] if not folder.is_dir()]
    if missing:
        raise UsageError(
            f"{missing[0]}: no such folder", fix="give run folders, or folders that contain run folders"
        )
    return list(given or [RUNS])


def _find(text: str) -> list[JobRow]:
    from everest_ds.jobs.job_table import find_runs, job_rows

    if Path(text).is_dir():
        rows = job_rows(find_runs([Path(text)]))
        live = [row for row in rows if not row.is_over]
        chosen = live or [row for row in rows if row.verdict.state != "finished"] or rows[-1:]
    elif is_job_id(text):
        rows = job_rows(find_runs([RUNS]))
        chosen = [row for row in rows if row.job_id == text or row.job_id.startswith(f"{text}_")]
    else:
        chosen = []
    if not chosen:
        raise UsageError("no such run or job", given=repr(text), fix="`everest-ds jobs` lists all jobs")
    return chosen


def _number(row: JobRow) -> tuple[int, ...]:
    return tuple(int(part) for part in row.job_id.split("_")) if is_job_id(row.job_id) else ()


def _requeue(row: JobRow) -> str:
    from everest_ds.jobs.slurm import call

    if row.verdict.state == "held":
        call(["scontrol", "release", row.job_id])
        return "released"
    if row.slurm is None or row.slurm.waits:
        return "already waits in the queue"
    call(["scontrol", "requeue", row.job_id])
    return "requeued"


def _submit_again(row: JobRow, after: str | None) -> str:
    from everest_ds.jobs.events import JobEvent, append_event
    from everest_ds.jobs.resubmit import load_job
    from everest_ds.jobs.slurm import submit_job

    number = row.job_id.partition("_")[2] if row.home != row.run else None
    job, folder = load_job(row.home, "sweep" if number else row.task)
    asked = time.time()
    job = replace(job, dependency=f"afterok:{after}" if after else None, array=number)
    job_id = submit_job(job, folder) + (f"_{number}" if number else "")
    append_event(row.run, JobEvent("submitted", job_id, task=row.task, seconds=asked))
    return job_id
