"""The command `everest-ds report`, which compares efficiency with published figures, and between runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everest_ds.console import print_facts, progress_of
from everest_ds.efficiency.published import select_cells

RunFolders = Annotated[
    list[Path] | None,
    typer.Argument(metavar="[RUN]...", help="Run folders to compare; without any, the published tables."),
]
ReportFolder = Annotated[Path, typer.Option("--out", help="Folder to write the report to.")]
TableNames = Annotated[
    str,
    typer.Option(
        "--tables",
        metavar="NAME,...",
        help="Published tables to include, by name; default: all tables, or none if runs are given.",
    ),
]
ModelNames = Annotated[
    str, typer.Option("--models", metavar="NAME,...", help="Methods or backbones to include; default: all.")
]
MeasuredFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--measured", metavar="FILE", help="Add the measurements that `profile --measure --json FILE` wrote."
    ),
]


def report(
    runs: RunFolders = None,
    out: ReportFolder = Path("report"),
    tables: TableNames = "",
    models: ModelNames = "",
    measured: MeasuredFiles = None,
) -> None:
    """Write a report that compares published efficiency figures with ours, or runs with each other.

    The report is written as HTML, Markdown, CSV and JSON with plots. No GPU is needed.

    Example: everest-ds report --out report          compare every published figure with ours
             everest-ds report runs/a runs/b         compare compute, memory, speed and accuracy of two runs
    """
    from everest_ds.efficiency.report_files import write_report  # imports torch

    cells = [] if runs and not (tables or models) else select_cells(_split(tables), _split(models))
    with progress_of("figures", len(cells)) as on_progress:
        written = write_report(out, cells, runs or [], measured or [], on_progress)
    facts = {**written.summary, "read": out / "report.html"}
    print_facts(f"{written.title}: {written.num_rows} rows", facts)
    for file in written.unmatched:
        typer.echo(
            f"{file}: this report has no published figure for the measured model and tokens; the measurement"
            " appears only in the plot of step times",
            err=True,
        )


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
