"""Where each choice starts to pay: the best candidate of every choice, over numbers of GPUs.

Waiting for data is left out: where the decoding of videos sets the pace, all choices would look alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, get_args

from everest_ds.config import Experiment
from everest_ds.config.schema import RecomputeConfig
from everest_ds.tuning.correction import traits_of
from everest_ds.tuning.step_time import StepPrediction

TRAITS = ("ZeRO stage", "tensor degree", "recompute")
_MODES = get_args(RecomputeConfig.model_fields["mode"].annotation)
# The best of a choice pays if no other is faster by more; the model is not that exact, but ties are ties.
_TIE_SHARE = 0.005


class Predicted(Protocol):
    """What is needed of a candidate of the search."""

    @property
    def config(self) -> Experiment:
        """Under which it would run."""

    @property
    def step(self) -> StepPrediction:
        """Its predicted step."""


@dataclass(frozen=True)
class WhatIf:
    """One number of GPUs.

    Attributes:
        clips_per_s: of the best candidate, all ranks, if it need not wait for data.
        data_wait_pct: share of its step that it waits, as predicted.
        by_choice: trait -> value -> clips a second of the best candidate of that value.
        best: trait -> value of the best candidate.
    """

    gpus: int
    clips_per_s: float
    data_wait_pct: float
    by_choice: dict[str, dict[str, float]]
    best: dict[str, str]


@dataclass(frozen=True)
class Pays:
    """A choice, and the numbers of GPUs with which it fits, and with which nothing is faster."""

    trait: str
    value: str
    fits: tuple[int, ...]
    pays: tuple[int, ...]


def ask_what_if(ranked: Callable[[int], Sequence[Predicted]], numbers: Sequence[int]) -> list[WhatIf]:
    """A row for each number of GPUs for which there is a candidate at all.

    Args:
        ranked: the candidates that fit on so many GPUs, best first; none if nothing fits.
    """
    found = ((gpus, ranked(gpus)) for gpus in numbers)
    return [_summarise(gpus, candidates) for gpus, candidates in found if candidates]


def where_it_pays(rows: Sequence[WhatIf]) -> list[Pays]:
    """Every choice of every trait, with the numbers of GPUs that it is good for."""
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
    """The values of a trait that any candidate has; recompute modes from the least to the most."""
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
    """If data were always there."""
    return step.clips / (step.step_s - step.split()["data"])
