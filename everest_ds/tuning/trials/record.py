"""The results of trials: short real runs of candidates, stored so that none is measured twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any, Literal

from everest_ds.config import Experiment, plan_ranks
from everest_ds.errors import RunFolderError

TRIALS_FILE = "trials.jsonl"
# The first steps of a trial do not count: they fill buffers and caches.
WARM_UP_STEPS = 3

TrialOutcome = Literal["measured", "oom", "crash", "timeout"]


@dataclass(frozen=True)
class Trial:
    """The outcome of one candidate's trial.

    Attributes:
        key: result of `trial_key`, which identifies config, machine and versions.
        name: human-readable name of the candidate.
        overrides: overrides of the recipe.
        outcome: how the trial ended.
        step_s: median of the steps after warm-up; None unless measured, as are the next two.
        peak_bytes: peak memory of rank 0: allocated on a GPU, resident in host memory on a CPU.
        data_wait_pct: median share of a step spent waiting for the loader.
        reason: why the trial measured nothing; "" if it did.
    """

    key: str
    name: str
    overrides: tuple[str, ...]
    outcome: TrialOutcome
    step_s: float | None = None
    peak_bytes: int | None = None
    data_wait_pct: float | None = None
    reason: str = ""


def trial_key(config: Experiment, num_ranks: int, place: Mapping[str, Any]) -> str:
    """Return a key that is equal for trials that would measure the same.

    Args:
        config: config of the trial.
        num_ranks: number of ranks.
        place: the machine and the versions, as a JSON tree.
    """
    settings = config.model_dump(mode="json", exclude={"run", "schedule", "batch"})
    batch = asdict(plan_ranks(config, num_ranks))
    text = json.dumps([settings, batch, num_ranks, place], sort_keys=True)
    return sha256(text.encode()).hexdigest()[:12]


def summarise_steps(rows: Sequence[Mapping[str, Any]], clips: int) -> dict[str, Any]:
    """Return step time, peak memory and data wait of a run that logged every step of `clips` clips.

    Raises:
        RunFolderError: no step was logged after warm-up.
    """
    steps = [row for row in rows if "clips_per_s" in row]
    settled = steps[WARM_UP_STEPS:]
    if not settled:
        allowed = f"more than {WARM_UP_STEPS}, the warm-up"
        raise RunFolderError("a trial logged too few steps", given=f"{len(steps)} steps", allowed=allowed)
    return {
        "step_s": clips / median(row["clips_per_s"] for row in settled),
        "peak_bytes": max(row["memory_bytes"] for row in settled),
        "data_wait_pct": median(row["data_wait_pct"] for row in settled),
    }


def append_trial(folder: Path, trial: Trial) -> None:
    """Append a trial to the record in a folder.

    Raises:
        RunFolderError: the file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / TRIALS_FILE, "a") as stream:
            stream.write(json.dumps(asdict(trial)) + "\n")
    except OSError as error:
        raise RunFolderError(f"{folder / TRIALS_FILE}: cannot be written", given=str(error)) from None


def read_trials(folder: Path) -> dict[str, Trial]:
    """Return the last trial of each key; a last line that an interruption cut short is ignored.

    Raises:
        RunFolderError: a line is damaged.
    """
    file = folder / TRIALS_FILE
    try:
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        rows = [json.loads(line) for line in lines]
        trials = [Trial(**{**row, "overrides": tuple(row["overrides"])}) for row in rows]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(
            f"{file}: damaged", given=str(error), fix="remove the file; the trials then run again"
        ) from None
    return {trial.key: trial for trial in trials}
