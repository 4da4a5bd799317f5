"""The runs of the trials: candidates and baselines, on this machine or as a SLURM array job."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
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
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.trials.one_trial import (
    Setup,
    TrialEnd,
    read_steps,
    reads_synthetic_clips,
    run_here,
    trial_overrides,
)
from everest_ds.tuning.trials.record import Trial, TrialOutcome, append_trial, read_trials, trial_key
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
class TrialArray:
    """The array job of the trials: `gpus_per_node` 0 means ranks on CPUs; `options` go to sbatch."""

    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    options: str


def with_trials(setup: Setup, candidates: Sequence[Candidate], place: Mapping[str, Any]) -> list[Candidate]:
    """Return the candidates with the trials that earlier commands recorded."""
    known = read_trials(setup.folder)
    return [
        replace(one, trial=known.get(trial_key(one.config, setup.num_ranks, place))) for one in candidates
    ]


def try_here(setup: Setup, candidates: Sequence[Candidate], place: Mapping[str, Any]) -> list[Candidate]:
    """Run the candidates without a trial on this machine, one at a time; record each as soon as it ends."""
    todo = [one for one in with_trials(setup, candidates, place) if one.trial is None]
    if todo:
        overrides = _prepared(setup, todo[0].config)
        with progress_of("trials", len(todo)) as on_progress:
            for number, one in enumerate(todo, 1):
                run = setup.runs / run_name(setup, one, place)
                end = run_here(setup, (*overrides, *one.overrides), run)
                _record(setup, one, place, end, run)
                on_progress(number)
    return with_trials(setup, candidates, place)


def try_by_slurm(
    setup: Setup, candidates: Sequence[Candidate], place: Mapping[str, Any], array: TrialArray
) -> list[Candidate]:
    """Record the trials that array jobs have finished and submit those not yet submitted, without waiting."""
    todo = {
        run_name(setup, one, place): one for one in with_trials(setup, candidates, place) if one.trial is None
    }
    rows = _job_rows(setup, list(todo))
    for name, row in rows.items():
        if row.is_over and row.status.state in _OUTCOMES:
            end = TrialEnd(_OUTCOMES[row.status.state], row.status.reason)
            _record(setup, todo[name], place, end, row.run)
    waiting = [name for name, row in rows.items() if not row.is_over]
    # A job that ended without an outcome of its trial (stopped, preempted, node lost) is submitted again.
    over = [name for name, row in rows.items() if row.is_over and row.status.state not in _OUTCOMES]
    new = [name for name in todo if name not in rows or name in over]
    if new:
        _submit(setup, {name: todo[name] for name in new}, array)
    if new or waiting:
        print(
            f"trials in the queue: {len(new) + len(waiting)};"
            " run the same command again to read their results"
        )
    return with_trials(setup, candidates, place)


def run_name(setup: Setup, candidate: Candidate, place: Mapping[str, Any]) -> str:
    """Return the name of a candidate's run folder: its own name and its unique trial key."""
    name = _NOT_IN_A_NAME.sub("-", candidate.name)
    return f"{name}-{trial_key(candidate.config, setup.num_ranks, place)}"


def _prepared(setup: Setup, config: Experiment) -> tuple[str, ...]:
    if reads_synthetic_clips(config):
        missing = "is not set" if config.data.train is None else f"{config.data.train} does not exist here"
        print(
            f"data.train {missing}: trials read synthetic clips with the frame count and size of the recipe"
        )
    return trial_overrides(setup, config)


def _record(setup: Setup, candidate: Candidate, place: Mapping[str, Any], end: TrialEnd, run: Path) -> None:
    """Append the trial of a candidate to the record, and print its figures beside the predictions."""
    figures: dict[str, Any] = {}
    if end.outcome == "measured":
        try:
            figures = read_steps(run, candidate.step.clips)
        except RunFolderError as error:
            end = TrialEnd("crash", str(error))
    key = trial_key(candidate.config, setup.num_ranks, place)
    trial = Trial(key, candidate.name, candidate.overrides, end.outcome, **figures, reason=end.reason)
    append_trial(setup.folder, trial)
    text = f"{trial.outcome}: {trial.reason}"
    if trial.step_s is not None and trial.peak_bytes is not None:
        text = (
            f"{trial.step_s:.3g} s per step (predicted {candidate.step.step_s:.3g}),"
            f" {format_bytes(trial.peak_bytes)} (predicted {format_bytes(candidate.needed_bytes)})"
        )
    print(f"{candidate.name}: {text}")


def _job_rows(setup: Setup, names: Sequence[str]) -> dict[str, JobRow]:
    """Map the name of each submitted trial to its newest job."""
    arrays = sorted(file.parent for file in setup.runs.glob(f"array-*/{SWEEP_FILE}"))
    runs = [array / name for array in arrays for name in names if (array / name).is_dir()]
    return {row.run.name: row for row in job_rows(runs)}


def _submit(setup: Setup, trials: Mapping[str, Candidate], array: TrialArray) -> None:
    overrides = _prepared(setup, next(iter(trials.values())).config)
    digest = sha256("\n".join(trials).encode()).hexdigest()[:8]
    folder = setup.runs / f"array-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    for name in trials:  # left over: an earlier job was stopped
        shutil.rmtree(folder / name, ignore_errors=True)
    lines = [json.dumps({"name": name, "overrides": list(one.overrides)}) for name, one in trials.items()]
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
