"""The files of the efficiency report: HTML, Markdown, CSV, JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from everest_ds.console import format_csv
from everest_ds.efficiency.arrange import Heading, arrange, summarise
from everest_ds.efficiency.markdown import render_markdown
from everest_ds.efficiency.measured import measured_rows, read_measured
from everest_ds.efficiency.published import Cell, published_tables
from everest_ds.efficiency.report_page import render_efficiency_page
from everest_ds.efficiency.report_plots import draw_plots
from everest_ds.efficiency.runs import RUNS_HEADING, RUNS_TABLE, read_runs, run_rows
from everest_ds.efficiency.tables import OURS, ComparisonRow, build_rows
from everest_ds.errors import UsageError
from everest_ds.output_paths import output_below
from everest_ds.reports.page import Plot
from everest_ds.training.run_folder import describe_environment

_TITLE = "Efficiency report"
_LEAD = (
    "Every published figure is listed beside ours. GFLOPs follow the convention of the literature:"
    " a multiply-accumulate counts 1 and LayerNorm 5 per element, for the forward pass of one clip."
)
_LEAD_OF_RUNS = "A comparison of runs: predicted compute and memory, and the figures that the runs measured."


class WrittenReport(NamedTuple):
    """A report that was written.

    Attributes:
        title: title of the report.
        num_rows: number of figures in it.
        summary: its headline figures by label.
        unmatched: files of measurements that no published figure corresponds to; they are only plotted.
    """

    title: str
    num_rows: int
    summary: dict[str, str]
    unmatched: list[Path]


def write_report(
    out: Path,
    cells: Sequence[Cell],
    run_folders: Sequence[Path],
    measured_files: Sequence[Path],
    on_progress: Callable[[int], None],
) -> WrittenReport:
    """Compare published cells, runs and measurements, and write all files of the report into `out`.

    Args:
        out: folder of the report.
        cells: published figures to compare ours with.
        run_folders: runs to compare with each other.
        measured_files: measurements that `everest-ds profile --measure --json FILE` wrote.
        on_progress: called with the number of cells that are done.

    Raises:
        RunFolderError: if a folder is not a run folder, or has no logged training step.
        UsageError: if a file cannot be read or written, would lie outside `out`, or is an input.
    """
    runs, measurements = read_runs(run_folders), [read_measured(file) for file in measured_files]
    rows = build_rows(cells, on_progress) + measured_rows(cells, measurements)
    rows += [row for run in runs for row in run_rows(run)]
    inputs = {file.resolve() for file in measured_files}
    summary = _write(out, rows, draw_plots(rows, runs, measurements), inputs)
    pairs = zip(measured_files, measurements, strict=True)
    unmatched = [file for file, measurement in pairs if not measured_rows(cells, [measurement])]
    return WrittenReport(_TITLE, len(rows), summary, unmatched)


def _write(
    out: Path, rows: Sequence[ComparisonRow], plots: Sequence[Plot], inputs: Collection[Path]
) -> dict[str, str]:
    """Write the files of the report, and return its headline figures."""
    written = [asdict(row) for row in rows]
    grids, summary, lead = arrange(written, _headings()), summarise(written), _LEAD
    if all(row["table"] == RUNS_TABLE for row in written):
        lead = _LEAD_OF_RUNS
    files = {
        f"{grid.name}.csv": format_csv([r for r in written if r["table"] == grid.name]) for grid in grids
    }
    files |= {f"plots/{plot.name}.svg": plot.svg for plot in plots}
    files["report.json"] = json.dumps(written, indent=1) + "\n"
    images = [(plot.caption, f"plots/{plot.name}.svg") for plot in plots]
    files["report.md"] = render_markdown(_TITLE, lead, grids, images)
    files["report.html"] = render_efficiency_page(_TITLE, lead, summary, grids, plots, OURS, _provenance())
    for file, text in {output_below(out, Path(name), inputs): text for name, text in files.items()}.items():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        except OSError as error:
            raise UsageError(
                f"{file}: cannot write the report", given=str(error), fix="choose another --out"
            ) from None
    return summary


def _headings() -> dict[str, Heading]:
    published = {
        name: Heading(table.title, f"{table.text} Source: {table.source}.", table.columns)
        for name, table in published_tables().items()
    }
    return {**published, RUNS_TABLE: RUNS_HEADING}


def _provenance() -> str:
    here = describe_environment(world_size=1)
    git = here["git"] or {}
    state = (
        f"commit {git['commit'][:10]}{' with uncommitted changes' if git['dirty'] else ''}"
        if git
        else "unknown commit"
    )
    packages = here["packages"]
    return f"everest-ds {packages['everest-ds']}, {state}, torch {packages['torch']}, {here['time']}"
