"""The runs of a sweep: their plan as one array job, checked before the job queues, and their results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from everest_ds.config import load_experiment
from everest_ds.errors import EverestError, RunFolderError, UsageError
from everest_ds.jobs.job_checks import Stage, Target, check_run
from everest_ds.jobs.job_table import JobRow, Progress, job_rows
from everest_ds.jobs.sweep_file import (
    SWEEP_FILE,
    SweepCandidate,
    expand_grid,
    read_candidates,
    read_settings,
    write_candidates,
)


def plan_sweep(
    source: str, overrides: Sequence[str], target: Target, grid: Sequence[str], candidates: Path | None
) -> tuple[list[Stage], list[SweepCandidate]]:
    """Plan the array job of a sweep and check each of its runs.

    Memory is not checked: for a sweep, a run that is out of memory is a result.

    Raises:
        EverestError: if a candidate cannot run; the message names it.
    """
    if grid and candidates is not None:
        raise UsageError("sweep: --grid and --candidates were both given", fix="leave one of them out")
    if not grid and candidates is None:
        raise UsageError("sweep: neither --grid nor --candidates was given", fix="give one of them")
    base = load_experiment(source, overrides)
    folder = base.run.dir
    settings = read_settings(candidates) if candidates else [(None, texts) for texts in expand_grid(grid)]
    swept = []
    for number, (given_name, texts) in enumerate(settings):
        name = given_name or f"{number:03d}"
        place = f"run.dir={json.dumps(str(folder / name))}"
        swept.append(SweepCandidate(name, base.task, source, texts, (*overrides, *texts, place)))
    _check(swept, replace(target, gpu=None), folder)
    facts = {"sweep": str(folder), "runs": len(swept), "each": f"{target.shape.num_ranks} ranks"}
    return [Stage("sweep", (str(folder / SWEEP_FILE),), folder, target.shape, facts)], swept


def keep_candidates(stage: Stage, swept: Sequence[SweepCandidate]) -> None:
    """Write the candidates to the sweep's folder: task N of the array runs line N.

    Raises:
        RunFolderError: if the sweep's folder cannot be written.
    """
    assert stage.run is not None
    try:
        stage.run.mkdir(parents=True, exist_ok=True)
        write_candidates(stage.run / SWEEP_FILE, swept)
    except OSError as error:
        raise RunFolderError(f"{stage.run}: cannot be written", given=str(error)) from None


def sweep_results(folder: Path) -> list[dict[str, Any]]:
    """Return one row per run of a sweep: its settings, state, loss, accuracy, speed and memory.

    Raises:
        UsageError: if the folder does not hold the candidates of a sweep.
    """
    swept = read_candidates(folder / SWEEP_FILE)
    jobs = {row.run: row for row in job_rows([folder / candidate.name for candidate in swept])}
    settings = [dict(text.partition("=")[::2] for text in candidate.settings) for candidate in swept]
    keys = list(dict.fromkeys(key for values in settings for key in values))
    return [
        _result(candidate.name, {key: values.get(key, "") for key in keys}, jobs.get(folder / candidate.name))
        for candidate, values in zip(swept, settings, strict=True)
    ]


def _result(name: str, settings: dict[str, str], job: JobRow | None) -> dict[str, Any]:
    progress = job.progress if job else Progress()
    return {
        "run": name,
        **settings,
        "state": job.status.state if job else "not submitted",
        "step": progress.step,
        "loss": progress.loss,
        "top1": progress.top1,
        "clips_per_s": progress.clips_per_s,
        "memory_gib": progress.memory_gib,
        "reason": job.status.reason if job else "",
    }


def _check(swept: Sequence[SweepCandidate], target: Target, folder: Path) -> None:
    names = [candidate.name for candidate in swept]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not swept or twice:
        raise UsageError(
            f"sweep: candidates share a name: {', '.join(twice)}"
            if twice
            else "sweep: there are no candidates",
            allowed="one or more candidates, each with its own name",
        )
    for candidate in swept:
        try:
            check_run(candidate.task, load_experiment(candidate.recipe, candidate.overrides), target)
        except EverestError as error:
            settings = " ".join(candidate.settings)
            raise type(error)(f"candidate {candidate.name} ({settings}): {error}") from None
    file = folder / SWEEP_FILE
    if file.is_file() and read_candidates(file) != list(swept):
        raise RunFolderError(f"{folder}: this folder holds another sweep", fix="choose another run.dir")
