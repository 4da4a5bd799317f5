"""`everest-ds tune --trials K`: run candidates and baselines for a few steps, here or as an array job."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from everest_ds.config import Experiment
from everest_ds.console import print_facts, progress_of
from everest_ds.errors import RunFolderError
from everest_ds.jobs.job_plan import Hardware, JobRequest, QueueSettings, plan_submission
from everest_ds.jobs.job_table import JobRow, job_rows
from everest_ds.jobs.queue import plan_tables, queue_all
from everest_ds.jobs.sbatch import split_options
from everest_ds.jobs.sweep_file import SWEEP_FILE
from everest_ds.tuning.trials.one_trial import (
    Ending,
    Setup,
    read_steps,
    reads_synthetic_clips,
    run_here,
    trial_overrides,
)
from everest_ds.tuning.trials.ranking import Tried
from everest_ds.tuning.trials.record import Trial, TrialOutcome, keep_trial, read_trials, trial_key
from everest_ds.units import format_bytes

# State of a job -> outcome of its trial. Other jobs (stopped, preempted, node lost) have none.
_OUTCOMES: dict[str, TrialOutcome] = {
    "finished": "measured",
    "out of memory": "oom",
    "out of host memory": "oom",
    "time limit": "timeout",
    "failed": "crash",
    "diverged": "crash",
    "rank lost": "crash",
}
# Harmless signal: a trial that hits its time limit must not be saved, requeued or resumed.
_NO_WARNING = ("--signal=CONT@10",)
_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9]+")


@dataclass(frozen=True)
class TrialEntry:
    """One candidate of the trials, with the config that it gives the recipe."""

    tried: Tried
    config: Experiment


@dataclass(frozen=True)
class Array:
    """The array job of the trials: `gpus_per_node` 0 means ranks on CPUs; `options` go to sbatch."""

    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    options: str


def with_trials(setup: Setup, entries: Sequence[TrialEntry], place: Mapping[str, Any]) -> list[TrialEntry]:
    """Return the entries with the trials that earlier commands recorded."""
    known = read_trials(setup.folder)
    keys = [trial_key(entry.config, setup.num_ranks, place) for entry in entries]
    return [_known(entry, known.get(key)) for entry, key in zip(entries, keys, strict=True)]


def try_here(setup: Setup, entries: Sequence[TrialEntry], place: Mapping[str, Any]) -> list[TrialEntry]:
    """Run the entries without a trial on this machine, one at a time, and record each as soon as it ends."""
    todo = [entry for entry in with_trials(setup, entries, place) if entry.tried.trial is None]
    if todo:
        overrides = _prepared(setup, todo[0].config)
        with progress_of("trials", len(todo)) as on_progress:
            for number, entry in enumerate(todo, 1):
                run = setup.runs / run_name(setup, entry, place)
                ending = run_here(setup, (*overrides, *entry.tried.overrides), run)
                _keep(setup, entry, place, ending, run)
                on_progress(number)
    return with_trials(setup, entries, place)


def try_by_slurm(
    setup: Setup, entries: Sequence[TrialEntry], place: Mapping[str, Any], array: Array
) -> list[TrialEntry]:
    """Record the trials that array jobs have finished and submit those not yet submitted, without waiting."""
    todo = {
        run_name(setup, entry, place): entry
        for entry in with_trials(setup, entries, place)
        if entry.tried.trial is None
    }
    rows = _job_rows(setup, list(todo))
    for name, row in rows.items():
        if row.is_over and row.status.state in _OUTCOMES:
            ending = Ending(_OUTCOMES[row.status.state], row.status.reason)
            _keep(setup, todo[name], place, ending, row.run)
    waiting = [name for name, row in rows.items() if not row.is_over]
    new = [name for name in todo if name not in rows or _may_go_on(rows[name])]
    if new:
        _submit(setup, {name: todo[name] for name in new}, array)
    if new or waiting:
        print(
            f"trials in the queue: {len(new) + len(waiting)};"
            " run the same command again to read their results"
        )
    return with_trials(setup, entries, place)


def run_name(setup: Setup, entry: TrialEntry, place: Mapping[str, Any]) -> str:
    """Return the name of an entry's run folder: its candidate's name and its unique trial key."""
    name = _NOT_IN_A_NAME.sub("-", entry.tried.name)
    return f"{name}-{trial_key(entry.config, setup.num_ranks, place)}"


def _known(entry: TrialEntry, trial: Trial | None) -> TrialEntry:
    return replace(entry, tried=replace(entry.tried, trial=trial))


def _prepared(setup: Setup, config: Experiment) -> tuple[str, ...]:
    if reads_synthetic_clips(config):
        missing = "is not set" if config.data.train is None else f"{config.data.train} does not exist here"
        print(
            f"data.train {missing}: trials read synthetic clips with the frame count and size of the recipe"
        )
    return trial_overrides(setup, config)


def _keep(setup: Setup, entry: TrialEntry, place: Mapping[str, Any], ending: Ending, run: Path) -> None:
    figures: dict[str, Any] = {}
    if ending.outcome == "measured":
        try:
            figures = read_steps(run, entry.tried.clips)
        except RunFolderError as error:
            ending = Ending("crash", str(error))
    key = trial_key(entry.config, setup.num_ranks, place)
    tried = entry.tried
    trial = Trial(key, tried.name, tried.overrides, ending.outcome, **figures, reason=ending.reason)
    keep_trial(setup.folder, trial)
    print(f"{tried.name}: {_told(tried, trial)}")


def _told(tried: Tried, trial: Trial) -> str:
    if trial.step_s is None or trial.peak_bytes is None:
        return f"{trial.outcome}: {trial.reason}"
    return (
        f"{trial.step_s:.3g} s per step (predicted {tried.predicted_s:.3g}),"
        f" {format_bytes(trial.peak_bytes)} (predicted {format_bytes(tried.predicted_bytes)})"
    )


def _arrays(setup: Setup) -> Iterator[Path]:
    yield from sorted(file.parent for file in setup.runs.glob(f"array-*/{SWEEP_FILE}"))


def _job_rows(setup: Setup, names: Sequence[str]) -> dict[str, JobRow]:
    """Map the name of each submitted trial to its newest job."""
    runs = [array / name for array in _arrays(setup) for name in names if (array / name).is_dir()]
    return {row.run.name: row for row in job_rows(runs)}


def _may_go_on(row: JobRow) -> bool:
    return row.is_over and row.status.state not in _OUTCOMES


def _submit(setup: Setup, entries: Mapping[str, TrialEntry], array: Array) -> None:
    overrides = _prepared(setup, next(iter(entries.values())).config)
    digest = sha256("\n".join(entries).encode()).hexdigest()[:8]
    folder = setup.runs / f"array-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in entries:  # left over: an earlier job was stopped
        shutil.rmtree(folder / name, ignore_errors=True)
    lines = [
        json.dumps({"name": name, "overrides": list(entry.tried.overrides)})
        for name, entry in entries.items()
    ]
    candidates = folder / "candidates.jsonl"
    candidates.write_text("".join(f"{line}\n" for line in lines))
    place = f"run.dir={json.dumps(str(folder))}"
    words, options = split_options([setup.source, *overrides, place, *shlex.split(array.options)])
    request = JobRequest(
        "sweep",
        words,
        Hardware(array.nodes, array.gpus_per_node or None, array.ranks_per_node),
        QueueSettings(options=(*_NO_WARNING, *options), max_restarts=0),
        candidates=candidates,
    )
    submission = plan_submission(request)
    for title, facts in plan_tables(submission):
        print_facts(title, facts)
    queue_all(submission, print)
