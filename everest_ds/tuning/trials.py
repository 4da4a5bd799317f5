"""What became of the candidates that were tried in short real runs; kept, so that none is measured twice."""

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

FILE_NAME = "trials.jsonl"
# Of a trial's steps, the first ones, in which buffers and caches are filled.
WARM_UP_STEPS = 3

Outcome = Literal["measured", "oom", "crash", "timeout"]


@dataclass(frozen=True)
class Trial:
    """How one candidate's run ended.

    Attributes:
        key: of `trial_key`: what was run, on what, with which versions.
        overrides: of the recipe.
        step_s: median of the steps after warm-up; None unless measured, as the next two.
        peak_bytes: of rank 0: allocated on a GPU, resident in host memory on a CPU.
        data_wait_pct: median share of a step spent waiting for the loader.
        reason: why it was not measured.
    """

    key: str
    name: str
    overrides: tuple[str, ...]
    outcome: Outcome
    step_s: float | None = None
    peak_bytes: int | None = None
    data_wait_pct: float | None = None
    reason: str = ""


def trial_key(config: Experiment, num_ranks: int, place: Mapping[str, Any]) -> str:
    """Equal for trials that would measure the same.

    Args:
        place: the machine and the versions, as JSON could hold them.
    """
    what = config.model_dump(mode="json", exclude={"run", "schedule", "batch"})
    batch = asdict(plan_ranks(config, num_ranks))
    text = json.dumps([what, batch, num_ranks, place], sort_keys=True)
    return sha256(text.encode()).hexdigest()[:12]


def summarise_steps(rows: Sequence[Mapping[str, Any]], clips: int) -> dict[str, Any]:
    """Step time, peak memory and waiting of a run that logged every step; `clips` are those of a step.

    Raises:
        RunFolderError: too few steps were logged.
    """
    steps = [row for row in rows if "clips_per_s" in row]
    settled = steps[WARM_UP_STEPS:]
    if not settled:
        raise RunFolderError("metrics of a trial", given=f"{len(steps)} steps", allowed="more than warm-up")
    return {
        "step_s": clips / median(row["clips_per_s"] for row in settled),
        "peak_bytes": max(row["memory_bytes"] for row in settled),
        "data_wait_pct": median(row["data_wait_pct"] for row in settled),
    }


def keep_trial(folder: Path, trial: Trial) -> None:
    """Add one line to the folder's trials.

    Raises:
        RunFolderError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / FILE_NAME, "a") as stream:
            stream.write(json.dumps(asdict(trial)) + "\n")
    except OSError as error:
        raise RunFolderError(f"{folder / FILE_NAME}: cannot be written", given=str(error)) from None


def read_trials(folder: Path) -> dict[str, Trial]:
    """Key -> trial, the last of each key; a last line that an interruption cut short is left out.

    Raises:
        RunFolderError: a line is damaged.
    """
    file = folder / FILE_NAME
    try:
        lines = file.read_text().split("\n")[:-1] if file.is_file() else []
        trials = [_trial(json.loads(line)) for line in lines]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise RunFolderError(
            f"{file}: damaged", given=str(error), fix="remove it; the trials run again"
        ) from None
    return {trial.key: trial for trial in trials}


def _trial(row: dict[str, Any]) -> Trial:
    return Trial(**{**row, "overrides": tuple(row["overrides"])})
