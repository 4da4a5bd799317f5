"""The effect of more or fewer GPUs: the search repeated for 1 to 1,024, and where each choice pays off.

A choice is a value of a knob that `tune --what-if` compares. Waiting for data is left out: if video decoding
limits the step, all choices would look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from everest_ds.config import Experiment
from everest_ds.console import progress_of
from everest_ds.costs.step_time import StepPrediction
from everest_ds.errors import EverestError, UsageError
from everest_ds.tuning.batches import keep_global_batch
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.cluster import cluster_of
from everest_ds.tuning.knobs import SCALING_TRAITS, value_order
from everest_ds.tuning.search import Options, search

NUMBERS = tuple(2**power for power in range(11))
# A choice pays off if no other is faster by more than this share: smaller differences count as ties.
_TIE_SHARE = 0.005


@dataclass(frozen=True)
class ScalingRow:
    """The predictions for one number of GPUs.

    Attributes:
        gpus: number of GPUs.
        clips_per_s: clips per second of the best candidate on all ranks if it never waits for data.
        data_wait_pct: predicted share of its step that it waits for data.
        by_choice: trait -> value -> clips per second of the best candidate with that value.
        best: trait -> value of the best candidate.
    """

    gpus: int
    clips_per_s: float
    data_wait_pct: float
    by_choice: dict[str, dict[str, float]]
    best: dict[str, str]


@dataclass(frozen=True)
class Payoff:
    """A choice, with the numbers of GPUs on which it fits and those on which no other choice is faster."""

    trait: str
    value: str
    fits_on: tuple[int, ...]
    pays_on: tuple[int, ...]


def search_numbers(
    config: Experiment, gpu: str | None, interconnect: str | None, options: Options, num_gpus: int
) -> tuple[str, list[ScalingRow]]:
    """Search every number of GPUs with the same global batch, that of `num_gpus`.

    Returns:
        A human-readable subject of the search, and its results.

    Raises:
        UsageError: no GPU type is given, or no candidate fits on any number of GPUs.
    """
    if gpu is None:
        raise UsageError("--what-if was given without --gpu", fix="name a GPU type, such as --gpu h100-80gb")
    config = keep_global_batch(config, num_gpus, options.global_batch)
    everything = replace(options, global_batch=None, exhaustive=True)
    rows = []
    with progress_of("what if", len(NUMBERS)) as on_progress:
        for done, number in enumerate(NUMBERS, 1):
            try:
                ranked = search(config, cluster_of(gpu, number, None, interconnect), everything).ranked
            except EverestError:  # the global batch cannot be split over so many ranks
                ranked = []
            if ranked:
                rows.append(summarise_number(number, ranked))
            on_progress(done)
    if not rows:
        raise UsageError("--what-if: no candidate fits on any of 1 to 1,024 GPUs", given=gpu)
    batch = config.batch.global_batch_size
    return f"{config.model.backbone}, {config.task}, {batch} clips per step, on {gpu}", rows


def summarise_number(gpus: int, candidates: Sequence[Candidate]) -> ScalingRow:
    """Return the row of a number of GPUs on which these candidates fit."""
    by_choice: dict[str, dict[str, float]] = {trait: {} for trait in SCALING_TRAITS}
    for candidate in candidates:
        traits, rate = candidate.traits, _fed_clips_per_s(candidate.step)
        for trait, choices in by_choice.items():
            choices[traits[trait]] = max(rate, choices.get(traits[trait], 0.0))
    best = max(candidates, key=lambda candidate: _fed_clips_per_s(candidate.step))
    waits = 100 * best.step.split()["data"] / best.step.step_s
    choice = {trait: best.traits[trait] for trait in SCALING_TRAITS}
    return ScalingRow(gpus, _fed_clips_per_s(best.step), waits, by_choice, choice)


def payoffs(rows: Sequence[ScalingRow]) -> list[Payoff]:
    """Return every choice of every trait, with the numbers of GPUs on which it fits and pays off."""
    found = []
    for trait in SCALING_TRAITS:
        for value in values_of(rows, trait):
            fits = [row for row in rows if value in row.by_choice[trait]]
            pays = [row for row in fits if row.by_choice[trait][value] >= (1 - _TIE_SHARE) * row.clips_per_s]
            found.append(Payoff(trait, value, tuple(r.gpus for r in fits), tuple(r.gpus for r in pays)))
    return found


def values_of(rows: Sequence[ScalingRow], trait: str) -> list[str]:
    """Return the values of a trait among all candidates, in the order that the config's schema lists them."""
    return sorted({value for row in rows for value in row.by_choice[trait]}, key=value_order(trait))


def _fed_clips_per_s(step: StepPrediction) -> float:
    """Return the clips per second of a step that never waits for data."""
    return step.clips / (step.step_s - step.split()["data"])
