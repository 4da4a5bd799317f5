"""Planning `everest-ds submit sweep`: the runs of an array job, each checked before it queues."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from everest_ds.cli.submission import Stage, Target, check_run
from everest_ds.config import Experiment, load_experiment
from everest_ds.errors import EverestError, RunFolderError, UsageError
from everest_ds.launch.sweep_file import (
    FILE_NAME,
    Candidate,
    expand_grid,
    read_candidates,
    read_settings,
    write_candidates,
)


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
