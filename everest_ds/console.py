"""Output of the commands: human-readable tables, and the same rows as JSON or CSV for programs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from everest_ds.errors import UsageError

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
# Words of keys that are written otherwise in headings.
_UNITS = {
    "gmacs": "GMACs",
    "gflops": "GFLOPs",
    "flops": "FLOPs",
    "gib": "GiB",
    "mib": "MiB",
    "gb": "GB",
    "pct": "%",
    "mfu": "MFU",
}
_UNBOUNDED = 10_000  # console width at which no table is wrapped, in characters


@cache
def stderr_console() -> Console:
    """Return the console of stderr, shared so that a live display knows of every line printed beside it."""
    return Console(stderr=True)


def print_table(title: str, rows: Sequence[Mapping[str, Any]], key: str | None = None) -> None:
    """Print `rows` as a table, with their keys as columns.

    Args:
        title: heading of the table.
        rows: rows with equal keys.
        key: column that identifies a row. Columns that exceed the console's width then move to further tables
            below, each beginning with this column. If None, the text of the columns is wrapped instead.
    """
    console = Console(width=None)
    names = list(rows[0]) if rows else []
    for number, part in enumerate(_parts_that_fit(rows, names, key, console)):
        console.print(_table(title if number == 0 else None, rows, part))


def _parts_that_fit(
    rows: Sequence[Mapping[str, Any]], names: list[str], key: str | None, console: Console
) -> list[list[str]]:
    """Distribute the columns over as many tables as the console's width requires."""
    if key is None:
        return [names]
    parts, unbounded = [[key]], console.options.update(max_width=_UNBOUNDED)
    for name in (name for name in names if name != key):
        wider = _table(None, rows, [*parts[-1], name])
        if len(parts[-1]) > 1 and console.measure(wider, options=unbounded).maximum > console.width:
            parts.append([key])
        parts[-1].append(name)
    return parts


def _table(title: str | None, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in names:
        numeric = all(isinstance(row[name], int | float | None) for row in rows)
        table.add_column(_heading(name), justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row[name]) for name in names))
    return table


def _heading(key: str) -> str:
    is_config_key = "." in key
    return key if is_config_key else " ".join(_UNITS.get(word, word) for word in key.split("_"))


def print_facts(title: str, facts: Mapping[str, Any]) -> None:
    """Print a table with one name and value per row."""
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(_heading(name), _cell(value))
    Console().print(table)


def print_text(text: str) -> None:
    """Print a line of text, which a terminal breaks between words."""
    console = Console()
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def print_problems(title: str, problems: Iterable[tuple[str, str]], base: Path) -> None:
    """Print a list of files by the reason of their problem.

    Every name stays whole on a line of its own, so that it can be copied.

    Args:
        title: heading of the list.
        problems: name and reason of each file.
        base: folder that names are relative to; the names of files elsewhere are printed in full.
    """
    console, by_reason = Console(highlight=False), dict[str, list[str]]()
    for name, reason in problems:
        below = name.removeprefix(f"{base}/").removeprefix(f"{base.absolute()}/")
        by_reason.setdefault(reason, []).append(below)
    console.print(title, style="bold", markup=False)
    for reason, names in by_reason.items():
        console.print(f"{len(names)} x {reason}", markup=False)
        for name in names:
            console.print(f"  {name}", markup=False, soft_wrap=True)


@contextmanager
def progress_of(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal, and yield a function to call with the number of finished items."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.update(task, completed=done)


def write_json(file: Path | None, value: object) -> None:
    """Write `value` to `file` as JSON, unless `file` is None."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value, indent=2, default=str) + "\n")
    except OSError as error:
        raise UsageError(f"{file}: cannot write the JSON file", given=str(error)) from None


def write_csv(file: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` to `file` as CSV with a header line of their keys, unless `file` is None."""
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(format_csv(rows), encoding="utf-8", newline="")
    except OSError as error:
        raise UsageError(f"{file}: cannot write the CSV file", given=str(error)) from None


def format_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return `rows` as CSV with a header line of their keys.

    Spreadsheets execute text that looks like a formula, such as the name of a video. Such a cell begins with
    an apostrophe, which makes it text.
    """
    names = list(rows[0]) if rows else []
    lines: list[list[object]] = [[*names], *([row[name] for name in names] for row in rows)]
    buffer = io.StringIO()
    csv.writer(buffer).writerows(
        [f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA_STARTS) else cell for cell in line]
        for line in lines
    )
    return buffer.getvalue()


def _cell(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.1f}" if round(value, 1) == value else f"{value:.2f}"
    return escape(str(value))
