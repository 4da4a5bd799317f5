"""The command `everest-ds report`, which compares published figures with ours, and runs with each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everest_ds.console import print_facts
from everest_ds.errors import UsageError

if TYPE_CHECKING:
    from everest_ds.efficiency.arrange import Heading
    from everest_ds.efficiency.measured import Measured
    from everest_ds.efficiency.published import Cell
    from everest_ds.efficiency.tables import ComparisonRow
    from everest_ds.reports.page import Plot

Runs = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[RUN]...", help="Run folders to compare; without any, the published tables."),
]
Out = Annotated[Path, typer.Option(help="Folder to write the report to.")]
Tables = Annotated[
    str,
    typer.Option(
        metavar="NAME,...",
        help="Published tables to include, by name; default: all tables, or none if runs are given.",
    ),
]
Models = Annotated[
    str, typer.Option(metavar="NAME,...", help="Methods or backbones to include; default: all.")
]
MeasuredFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--measured", metavar="FILE", help="Add the measurements that `profile --measure --json FILE` wrote."
    ),
]
TITLE = "Efficiency report"


def report(
    runs: Runs = None,
    out: Out = Path("report"),
    tables: Tables = "",
    models: Models = "",
    measured: MeasuredFiles = None,
) -> None:
    """Write a report that compares published figures with ours, or runs with each other.

    The report is written as HTML, Markdown, CSV and JSON with plots. No GPU is needed.

    Example: everest-ds report --out report          compare every published figure with ours
             everest-ds report runs/a runs/b         compare compute, memory, speed and accuracy of two runs
    """
    from everest_ds.efficiency.measured import read_measured
    from everest_ds.efficiency.published import select_cells
    from everest_ds.efficiency.report_plots import draw_plots
    from everest_ds.efficiency.runs import read_runs, run_rows

    compared, measurements = read_runs(runs or []), [read_measured(file) for file in measured or []]
    cells = [] if runs and not (tables or models) else select_cells(_split(tables), _split(models))
    rows = _rows_with_progress(cells, measurements)
    rows += [row for run in compared for row in run_rows(run)]
    _write(out, rows, draw_plots(rows, compared, measurements))
    _say_what_matches_no_row(cells, dict(zip(measured or [], measurements, strict=True)))


def _say_what_matches_no_row(cells: Sequence[Cell], measurements: Mapping[Path, Measured]) -> None:
    from everest_ds.efficiency.measured import measured_rows

    for file, measurement in measurements.items():
        if not measured_rows(cells, [measurement]):
            typer.echo(
                f"{file}: this report has no published figure for the measured model and tokens; the"
                " measurement appears only in the plot of step times",
                err=True,
            )


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _rows_with_progress(cells: Sequence[Any], measurements: Sequence[Measured]) -> list[ComparisonRow]:
    from rich.console import Console
    from rich.progress import Progress

    from everest_ds.efficiency.measured import measured_rows
    from everest_ds.efficiency.tables import build_rows

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("figures", total=len(cells))
        rows = build_rows(cells, lambda: progress.update(task, advance=1))
    return rows + measured_rows(cells, measurements)


def _write(out: Path, rows: Sequence[ComparisonRow], plots: Sequence[Plot]) -> None:
    """Write all files of the report, and print a summary with the file to open."""
    from everest_ds.efficiency.arrange import arrange, summarise, to_csv
    from everest_ds.efficiency.markdown import render_markdown
    from everest_ds.efficiency.report_page import render_efficiency_page
    from everest_ds.efficiency.tables import OURS

    written = [asdict(row) for row in rows]
    grids, summary = arrange(written, _headings()), summarise(written)
    files = {f"{grid.name}.csv": to_csv([r for r in written if r["table"] == grid.name]) for grid in grids}
    files |= {f"plots/{plot.name}.svg": plot.svg for plot in plots}
    files["report.json"] = json.dumps(written, indent=1) + "\n"
    images = [(plot.caption, f"plots/{plot.name}.svg") for plot in plots]
    files["report.md"] = render_markdown(TITLE, _lead(written), grids, images)
    files["report.html"] = render_efficiency_page(
        TITLE, _lead(written), summary, grids, plots, OURS, _provenance()
    )
    for name, text in files.items():
        _write_file(out / name, text)
    print_facts(f"{TITLE}: {len(rows)} rows", {**summary, "read": out / "report.html"})


def _headings() -> dict[str, Heading]:
    from everest_ds.efficiency.arrange import Heading
    from everest_ds.efficiency.published import published_tables
    from everest_ds.efficiency.runs import HEADING, TABLE

    published = {
        name: Heading(table.title, f"{table.text} Source: {table.source}.", table.columns)
        for name, table in published_tables().items()
    }
    return {**published, TABLE: HEADING}


def _lead(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the introduction of the report."""
    from everest_ds.efficiency.runs import TABLE

    if all(row["table"] == TABLE for row in rows):
        return "A comparison of runs: predicted compute and memory, and the figures that the runs measured."
    return (
        "Every published figure is listed beside ours. GFLOPs follow the convention of the literature:"
        " a multiply-accumulate counts 1 and LayerNorm 5 per element, for the forward pass of one clip."
    )


def _provenance() -> str:
    from everest_ds.training.run_folder import describe_environment

    here = describe_environment(world_size=1)
    git = here["git"] or {}
    state = (
        f"commit {git['commit'][:10]}{' with uncommitted changes' if git['dirty'] else ''}"
        if git
        else "unknown commit"
    )
    packages = here["packages"]
    return f"everest-ds {packages['everest-ds']}, {state}, torch {packages['torch']}, {here['time']}"


def _write_file(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    except OSError as error:
        raise UsageError(
            f"{file}: cannot write the report", given=str(error), fix="choose another --out"
        ) from None
