"""`everest-ds submit sweep` and `everest-ds sweep`: many runs of one recipe, one table of what they gave."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from everest_ds.cli.job_rows import JobRow, Progress, job_rows
from everest_ds.cli.output import JsonFile, print_table, write_csv, write_json
from everest_ds.cli.submission import Stage, Target, check_run
from everest_ds.config import Experiment, load_experiment
from everest_ds.errors import EverestError, RunFolderError, UsageError
from everest_ds.launch.sweep_file import (
    FILE_NAME,
    Candidate,
    expand_array,
    expand_grid,
    read_candidates,
    read_settings,
    write_candidates,
)

Folder = Annotated[
    Path, typer.Argument(metavar="SWEEP", help="The run.dir that the sweep was submitted with.")
]
CsvFile = Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Also write the rows as CSV.")]


def sweep(folder: Folder, json_file: JsonFile = None, csv_file: CsvFile = None) -> None:
    """One row a run of a sweep: settings, state, loss, accuracy, speed, memory. Out of memory is a result.

    Example: everest-ds sweep runs/lr --csv lr.csv
    """
    swept = read_candidates(folder / FILE_NAME)
    rows = {row.run: row for row in job_rows([folder / candidate.name for candidate in swept])}
    keys = list(dict.fromkeys(key for candidate in swept for key in _settings(candidate)))
    table = [_result(candidate, keys, rows.get(folder / candidate.name)) for candidate in swept]
    print_table(f"Sweep {folder}", table)
    write_json(json_file, table)
    write_csv(csv_file, table)


def candidate(file: Path, number: int) -> None:
    """Write the command and the arguments of one candidate, each ended by NUL; for slurm/sweep.sbatch."""
    swept = read_candidates(file)
    chosen = swept[expand_array(str(number), len(swept))[0]]
    for word in (chosen.task, chosen.recipe, *chosen.overrides):
        sys.stdout.buffer.write(os.fsencode(word) + b"\0")


def plan_sweep(
    source: str, overrides: Sequence[str], target: Target, grid: Sequence[str], candidates: Path | None
) -> tuple[list[Stage], list[Candidate]]:
    """One array job, each of whose tasks is checked; memory is not, for a run out of memory is a result.

    Raises:
        EverestError: naming the candidate that cannot run.
    """
    if bool(grid) == (candidates is not None):
        raise UsageError("sweep", given="--grid and --candidates", allowed="one of the two")
    base = load_experiment(source, overrides)
    folder = base.run.dir
    settings = read_settings(candidates) if candidates else [(None, texts) for texts in expand_grid(grid)]
    swept = [
        _candidate(base, source, overrides, name or f"{number:03d}", texts)
        for number, (name, texts) in enumerate(settings)
    ]
    _check(swept, replace(target, gpu=None), folder)
    facts = {"sweep": str(folder), "runs": len(swept), "each": f"{target.shape.num_ranks} ranks"}
    return [Stage("sweep", (str(folder / FILE_NAME),), folder, target.shape, facts)], swept


def keep_candidates(stage: Stage, swept: Sequence[Candidate]) -> None:
    """Write down what task N of the array is, and what the rows of the table are.

    Raises:
        RunFolderError: the sweep's folder cannot be written.
    """
    assert stage.run is not None
    try:
        stage.run.mkdir(parents=True, exist_ok=True)
        write_candidates(stage.run / FILE_NAME, swept)
    except OSError as error:
        raise RunFolderError(f"{stage.run}: cannot be written", given=str(error)) from None


def _candidate(
    base: Experiment, source: str, overrides: Sequence[str], name: str, settings: tuple[str, ...]
) -> Candidate:
    place = f"run.dir={json.dumps(str(base.run.dir / name))}"
    return Candidate(name, base.task, source, settings, (*overrides, *settings, place))


def _check(swept: Sequence[Candidate], target: Target, folder: Path) -> None:
    names = [candidate.name for candidate in swept]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not swept or twice:
        raise UsageError(
            "candidates of the sweep", given=f"{len(swept)}, {twice} twice", allowed="one or more"
        )
    for candidate in swept:
        try:
            check_run(candidate.task, load_experiment(candidate.recipe, candidate.overrides), target)
        except EverestError as error:
            said = " ".join(candidate.settings)
            raise type(error)(f"candidate {candidate.name} ({said}): {error}") from None
    file = folder / FILE_NAME
    if file.is_file() and read_candidates(file) != list(swept):
        raise RunFolderError(f"{folder}: holds another sweep", fix="choose another run.dir")


def _settings(candidate: Candidate) -> dict[str, str]:
    return {key: value for key, _, value in (text.partition("=") for text in candidate.settings)}


def _result(candidate: Candidate, keys: Sequence[str], row: JobRow | None) -> dict[str, Any]:
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
