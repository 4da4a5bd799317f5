"""`everest-ds jobs | logs | cancel | requeue | sweep`: show the jobs of runs, stop and restart them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from everest_ds.cli.options import CsvFile, JsonFile
from everest_ds.console import print_table, write_csv, write_json
from everest_ds.errors import UsageError
from everest_ds.jobs.job_control import restart_jobs, stop_job
from everest_ds.jobs.job_table import RUNS, JobRow, find_jobs, find_runs, in_order, job_rows
from everest_ds.jobs.log_tail import LogTail
from everest_ds.jobs.sweep import sweep_results

Folders = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="[FOLDER]...", help="Run folders, or folders that contain run folders. Default: runs."
    ),
]
Which = Annotated[list[str], typer.Argument(metavar="RUN|JOB...", help="Run folders or job numbers.")]
One = Annotated[str, typer.Argument(metavar="RUN|JOB", help="A run folder or a job number.")]
Now = Annotated[bool, typer.Option("--now", help="End jobs at once; the steps since the last save are lost.")]
Rank = Annotated[int, typer.Option(min=0, help="The rank whose log is printed.")]
AllRanks = Annotated[bool, typer.Option("--all", help="Print the logs of all ranks, merged by time.")]
OfJob = Annotated[
    bool, typer.Option("--job", help="Print the output of the job instead of the logs of ranks.")
]
Follow = Annotated[
    bool, typer.Option("--follow", "-f", help="Print new lines until the job ends or Ctrl-C is pressed.")
]
Lines = Annotated[int, typer.Option("--lines", "-n", min=0, help="Number of last lines to print first.")]
Sweep = Annotated[
    Path, typer.Argument(metavar="SWEEP", help="Folder of the sweep: the run.dir that it was submitted with.")
]

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
    rows = in_order(job_rows(find_runs(_folders(folders))))
    if rows:
        Console().print(jobs_table(rows))
    else:
        typer.echo("no jobs found; to queue one: everest-ds submit pretrain RECIPE")
    write_json(json_file, [_as_json(row) for row in rows])


def logs(
    which: One,
    rank: Rank = 0,
    all_ranks: AllRanks = False,
    of_job: OfJob = False,
    follow: Follow = False,
    lines: Lines = 20,
) -> None:
    """Print the end of a run's logs. A restarted run appends to the same logs.

    Example: everest-ds logs runs/first -f
    """
    row = find_jobs([which])[0]
    tail = LogTail.of_job(row) if of_job else LogTail.of_ranks(row, None if all_ranks else rank)
    shown = tail.last(lines)
    if not shown and not follow:
        raise UsageError(
            f"{tail.folder / tail.pattern}: no log lines yet", fix="wait for them with -f, or try --job"
        )
    _print_lines(shown)
    if follow:
        for shown in tail.follow(row.job_id):
            _print_lines(shown)


def cancel(which: Which, now: Now = False) -> None:
    """Stop jobs for good: a running job first saves a checkpoint, a waiting job leaves the queue.

    Example: everest-ds cancel runs/first
    """
    for row in find_jobs(which):
        typer.echo(f"{row.job_id}: {stop_job(row, now)}")


def requeue(which: Which) -> None:
    """Restart jobs from their newest checkpoints. Running jobs are requeued, ended jobs are submitted again.

    Several unfinished jobs of a run (finetune, evaluate) are submitted so that each waits for the one before.

    Example: everest-ds requeue runs/first
    """
    for row, how in restart_jobs(find_jobs(which)):
        typer.echo(f"{row.job_id}: {how}")


def sweep(folder: Sweep, json_file: JsonFile = None, csv_file: CsvFile = None) -> None:
    """Show one row per run of a sweep: its settings, state, loss, accuracy, speed and memory.

    A run that ran out of memory keeps its row, as a result like any other.

    Example: everest-ds sweep runs/lr --csv lr.csv
    """
    rows = sweep_results(folder)
    print_table(f"Sweep {folder}", rows)
    write_json(json_file, rows)
    write_csv(csv_file, rows)


def jobs_table(rows: Sequence[JobRow]) -> Group:
    """Build the table of jobs and, below it, the reason, next action and log of each."""
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
    state, progress = row.slurm, row.progress
    return [
        row.job_id,
        escape(str(row.run)),
        row.task,
        _styled(row.status.state),
        _progress(row),
        "" if progress.loss is None else f"{progress.loss:.4f}",
        "" if progress.clips_per_s is None else f"{progress.clips_per_s:.1f}",
        state.elapsed if state else "",
        str(row.restarts),
        escape(state.nodes) if state else "",
    ]


def _advice(row: JobRow) -> str:
    # The table shows only the fault of an error; its given, allowed and fix parts are in the log.
    reason = row.status.reason.partition("; given: ")[0]
    why = _styled(row.status.state) + (f": {escape(reason)}." if reason else ".")
    return f"{why} [bold]Next:[/bold] {escape(row.status.next)}  [dim]{escape(str(row.log))}[/dim]"


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
        "state": row.status.state,
        "reason": row.status.reason,
        "next": row.status.next,
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


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()
