"""`everest-ds sweep`: one table of the results of many runs of one recipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.console import print_table, write_csv, write_json
from everest_ds.jobs.sweep_file import SWEEP_FILE, SweepCandidate, expand_array, read_candidates

if TYPE_CHECKING:
    from everest_ds.jobs.job_table import JobRow

Folder = Annotated[
    Path, typer.Argument(metavar="SWEEP", help="Folder of the sweep: the run.dir that it was submitted with.")
]
CsvFile = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Also write the rows as CSV.")]


def sweep(folder: Folder, json_file: JsonFile = None, csv_file: CsvFile = None) -> None:
    """Show one row per run of a sweep: its settings, state, loss, accuracy, speed and memory.

    A run that ran out of memory keeps its row, as a result like any other.

    Example: everest-ds sweep runs/lr --csv lr.csv
    """
    from everest_ds.jobs.job_table import job_rows

    swept = read_candidates(folder / SWEEP_FILE)
    rows = {row.run: row for row in job_rows([folder / candidate.name for candidate in swept])}
    keys = list(dict.fromkeys(key for candidate in swept for key in _settings(candidate)))
    table = [_result(candidate, keys, rows.get(folder / candidate.name)) for candidate in swept]
    print_table(f"Sweep {folder}", table)
    write_json(json_file, table)
    write_csv(csv_file, table)


def candidate(file: Path, number: int) -> None:
    """Write the command and the arguments of one candidate, NUL-terminated, for slurm/sweep.sbatch."""
    swept = read_candidates(file)
    chosen = swept[expand_array(str(number), len(swept))[0]]
    for word in (chosen.task, chosen.recipe, *chosen.overrides):
        sys.stdout.buffer.write(os.fsencode(word) + b"\0")


def _settings(candidate: SweepCandidate) -> dict[str, str]:
    return {key: value for key, _, value in (text.partition("=") for text in candidate.settings)}


def _result(candidate: SweepCandidate, keys: Sequence[str], row: JobRow | None) -> dict[str, Any]:
    from everest_ds.jobs.job_table import Progress

    settings, progress = _settings(candidate), row.progress if row else Progress()
    return {
        "run": candidate.name,
        **{key: settings.get(key, "") for key in keys},
        "state": row.verdict.state if row else "not submitted",
        "step": progress.step,
        "loss": progress.loss,
        "top1": progress.top1,
        "clips_per_s": progress.clips_per_s,
        "memory_gib": progress.memory_gib,
        "reason": row.verdict.reason if row else "",
    }
