"""Where each choice starts to pay: the best candidate of every choice, over numbers of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from everest_ds.config import Experiment
from everest_ds.tuning.correction import traits_of
from everest_ds.tuning.step_time import StepPrediction

TRAITS = ("ZeRO stage", "tensor degree", "recompute")
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
        clips_per_s: of the best candidate, all ranks.
        by_choice: trait -> value -> clips a second of the best candidate of that value.
        best: trait -> value of the best candidate.
    """

    gpus: int
    clips_per_s: float
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
    choices = {(trait, value) for row in rows for trait in TRAITS for value in row.by_choice[trait]}
    return [
        Pays(
            trait,
            value,
            tuple(row.gpus for row in rows if value in row.by_choice[trait]),
            tuple(row.gpus for row in rows if _is_best(row, trait, value)),
        )
        for trait, value in sorted(choices, key=lambda choice: (TRAITS.index(choice[0]), choice[1]))
    ]


def _is_best(row: WhatIf, trait: str, value: str) -> bool:
    return row.by_choice[trait].get(value, 0.0) >= (1 - _TIE_SHARE) * row.clips_per_s


def _summarise(gpus: int, candidates: Sequence[Predicted]) -> WhatIf:
    by_choice: dict[str, dict[str, float]] = {trait: {} for trait in TRAITS}
    for candidate in candidates:
        traits, rate = traits_of(candidate.config), candidate.step.clips_per_s
        for trait in TRAITS:
            by_choice[trait][traits[trait]] = max(rate, by_choice[trait].get(traits[trait], 0.0))
    best = traits_of(max(candidates, key=lambda candidate: candidate.step.clips_per_s).config)
    rate = max(candidate.step.clips_per_s for candidate in candidates)
    return WhatIf(gpus, rate, by_choice, {trait: best[trait] for trait in TRAITS})
