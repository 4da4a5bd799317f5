"""`everest-ds jobs | logs | cancel | requeue | sweep`: show the jobs of runs, stop and restart them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group, JustifyMethod
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from everest_ds.cli.options import CsvFile, JsonFile
from everest_ds.console import print_table, write_csv, write_json
from everest_ds.errors import UsageError
from everest_ds.jobs.job_control import restart_jobs, stop_job
from everest_ds.jobs.job_table import (
    RUNS,
    JobRow,
    Progress,
    find_jobs,
    find_runs,
    in_submission_order,
    job_rows,
)
from everest_ds.jobs.log_tail import LogTail
from everest_ds.jobs.status import LOCAL
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
    "interrupted": "yellow",
    "forgotten": "dim",
}
# Columns in the order in which a narrow terminal leaves them out; it always shows job, run, state and steps.
_LEFT_OUT_FIRST = ("nodes", "progress", "restarts", "clips/s", "time", "loss", "task")
_JUSTIFIED: dict[str, JustifyMethod] = dict.fromkeys(("loss", "clips/s", "time", "restarts"), "right")
_PADDING = 2  # blanks beside each cell
_RUN_CELLS = 32  # of a longer path, at least these many characters are shown
_BAR_CELLS = 10


def jobs(folders: Folders = None, json_file: JsonFile = None) -> None:
    """List the jobs of runs: state, progress, loss, speed and restarts.

    Below the table, each job's state is explained, with what to do next and which log to read.

    Example: everest-ds jobs runs/first
    """
    rows = in_submission_order(job_rows(find_runs(_folders(folders))))
    if rows:
        console = Console()
        console.print(jobs_table(rows, console.width))
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
        for shown in tail.follow(row):
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
    restart_jobs(find_jobs(which), typer.echo)


def sweep(folder: Sweep, json_file: JsonFile = None, csv_file: CsvFile = None) -> None:
    """Show one row per run of a sweep: its settings, state, loss, accuracy, speed and memory.

    A run that ran out of memory keeps its row, as a result like any other.

    Example: everest-ds sweep runs/lr --csv lr.csv
    """
    rows = sweep_results(folder)
    # Runs of a sweep can differ in the fourth decimal of their losses.
    print_table(f"Sweep {folder}", [{**row, "loss": _format_loss(row["loss"])} for row in rows])
    write_json(json_file, rows)
    write_csv(csv_file, rows)


def jobs_table(rows: Sequence[JobRow], width: int) -> Group:
    """Build the table of jobs and, below it, the reason, next action and log of each.

    If not all columns fit into `width` characters, the less important ones are left out. Every row names its
    run, if need be by the end of its path.
    """
    cells = [_cells(row) for row in rows]
    widths = {name: max(len(row[name]) for row in cells) for name in cells[0]}
    widths = {name: max(len(name), longest) for name, longest in widths.items() if longest}
    paths, shown = [str(row.run) for row in rows], dict.fromkeys(widths)
    needed = min(_RUN_CELLS, max(map(len, paths)))
    for name in _LEFT_OUT_FIRST:
        if width < _PADDING + needed + sum(widths[one] + _PADDING for one in shown):
            shown.pop(name, None)
    runs = shorten(paths, width - _PADDING - sum(widths[one] + _PADDING for one in shown))
    table = Table(box=None)
    for name in ("job", "run", *list(shown)[1:]):
        justify = _JUSTIFIED.get(name, "left")
        table.add_column(name, overflow="fold", no_wrap=name != "run", justify=justify)
    advice = Table.grid(padding=(0, 1, 0, 2))
    for row, run, cell in zip(rows, runs, cells, strict=True):
        first, *rest = (cell[name] for name in shown)
        table.add_row(first, Text(run), *rest)
        advice.add_row(run if row.job_id == LOCAL else row.job_id, _advice(row))
    return Group(table, "", advice)


def shorten(paths: Sequence[str], width: int) -> list[str]:
    """Cut off the beginning of paths longer than `width`; paths that would become equal are kept whole."""
    ends = {path: path if len(path) <= width else f"…{path[1 - max(width, 2) :]}" for path in paths}
    uses = Counter(ends.values())
    return [path if uses[ends[path]] > 1 else ends[path] for path in paths]


def _cells(row: JobRow) -> dict[str, Text]:
    state, progress = row.slurm, row.progress
    return {
        "job": Text(row.job_id),
        "task": Text(row.task),
        "state": Text(row.status.state, _style(row)),
        "progress": _bar(progress),
        "steps": Text(_steps(progress)),
        "loss": Text(_format_loss(progress.loss)),
        "clips/s": Text("" if progress.clips_per_s is None else f"{progress.clips_per_s:.1f}"),
        "time": Text(state.elapsed if state else ""),
        "restarts": Text(str(row.restarts)),
        "nodes": Text(state.nodes if state else ""),
    }


def _format_loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _advice(row: JobRow) -> str:
    # The table shows only the fault of an error; its given, allowed and fix parts are in the log.
    reason = row.status.reason.partition("; given: ")[0]
    why = f"[{_style(row)}]{row.status.state}[/]" + (f": {escape(reason)}." if reason else ".")
    return f"{why} [bold]Next:[/bold] {escape(row.status.next)}  [dim]{escape(str(row.log))}[/dim]"


def _style(row: JobRow) -> str:
    return _STYLES.get(row.status.state, "red")


def _bar(progress: Progress) -> Text:
    filled = round(_BAR_CELLS * (progress.share or 0))
    done, left = "━" * filled, "━" * (_BAR_CELLS - filled)
    return Text("") if progress.share is None else Text.assemble((done, "green"), (left, "dim"))


def _steps(progress: Progress) -> str:
    if progress.step is None:
        return "" if progress.top1 is None else f"top-1 {progress.top1:.1f} %"
    return f"step {progress.step}" if progress.share is None else f"{progress.step} of {progress.total_steps}"


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
