"""The number of GPUs from which each choice pays: the best candidate of every choice, by number of GPUs.

Waiting for data is left out: if video decoding limits the step, all choices would look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

from everest_ds.config import Experiment
from everest_ds.config.schema import RecomputeConfig
from everest_ds.costs.step_time import StepPrediction
from everest_ds.tuning.trials.correction import traits_of

TRAITS = ("ZeRO stage", "tensor degree", "recompute")
_MODES = get_args(RecomputeConfig.model_fields["mode"].annotation)
# A choice pays if no other is faster by more than this share: smaller differences count as ties.
_TIE_SHARE = 0.005


class Predicted(Protocol):
    """The part of a search candidate that this module needs."""

    @property
    def config(self) -> Experiment:
        """Return the config of the candidate."""

    @property
    def step(self) -> StepPrediction:
        """Return the predicted step of the candidate."""


@dataclass(frozen=True)
class WhatIf:
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
class Pays:
    """A choice, with the numbers of GPUs on which it fits and those on which no other choice is faster."""

    trait: str
    value: str
    fits: tuple[int, ...]
    pays: tuple[int, ...]


def ask_what_if(ranked: Callable[[int], Sequence[Predicted]], numbers: Sequence[int]) -> list[WhatIf]:
    """Return a row for each number of GPUs that has a candidate.

    Args:
        ranked: maps a number of GPUs to the candidates that fit, best first; empty if nothing fits.
        numbers: numbers of GPUs to ask for.
    """
    found = ((gpus, ranked(gpus)) for gpus in numbers)
    return [_summarise(gpus, candidates) for gpus, candidates in found if candidates]


def where_it_pays(rows: Sequence[WhatIf]) -> list[Pays]:
    """Return every choice of every trait, with the numbers of GPUs on which it fits and pays."""
    return [
        Pays(
            trait,
            value,
            tuple(row.gpus for row in rows if value in row.by_choice[trait]),
            tuple(row.gpus for row in rows if _is_best(row, trait, value)),
        )
        for trait in TRAITS
        for value in values_of(rows, trait)
    ]


def values_of(rows: Sequence[WhatIf], trait: str) -> list[str]:
    """Return the values of a trait among all candidates; recompute modes from the least to the most."""
    values = {value for row in rows for value in row.by_choice[trait]}
    return sorted(values, key=lambda value: (_MODES.index(value) if value in _MODES else 0, value))


def _is_best(row: WhatIf, trait: str, value: str) -> bool:
    return row.by_choice[trait].get(value, 0.0) >= (1 - _TIE_SHARE) * row.clips_per_s


def _summarise(gpus: int, candidates: Sequence[Predicted]) -> WhatIf:
    by_choice: dict[str, dict[str, float]] = {trait: {} for trait in TRAITS}
    for candidate in candidates:
        traits, rate = traits_of(candidate.config), _fed_clips_per_s(candidate.step)
        for trait in TRAITS:
            by_choice[trait][traits[trait]] = max(rate, by_choice[trait].get(traits[trait], 0.0))
    best = max(candidates, key=lambda candidate: _fed_clips_per_s(candidate.step))
    traits, waits = traits_of(best.config), 100 * best.step.split()["data"] / best.step.step_s
    rate = _fed_clips_per_s(best.step)
    return WhatIf(gpus, rate, waits, by_choice, {trait: traits[trait] for trait in TRAITS})


def _fed_clips_per_s(step: StepPrediction) -> float:
    """Return the clips per second of a step that never waits for data."""
    return step.clips / (step.step_s - step.split()["data"])
