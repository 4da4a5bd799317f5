"""Correction of the cost model by trials: factors for families of candidates, chosen by leave-one-out.

A factor is the median ratio of measured to predicted. Candidates may have one factor in common, or one for
each value of a trait (each ZeRO stage, each recompute mode, ...). The correction that best predicts each
trial from the others is used, or none if none helps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import exp, log
from statistics import fmean, median

# With fewer trials of a trait's value, its factor would be noise.
_FEWEST = 2
_WORTH_A_FACTOR = 0.9  # the error must fall below this share: by chance, some trait always seems to matter


@dataclass(frozen=True)
class Observed:
    """A figure of one trial, predicted and measured in the same unit, with the traits of its candidate."""

    traits: Mapping[str, str]
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Return the ratio of measured to predicted."""
        return self.measured / self.predicted


@dataclass(frozen=True)
class Correction:
    """The correction factors of predictions.

    Attributes:
        trait: trait by which factors differ; None if all candidates share one.
        common: factor of candidates whose value of the trait has no factor of its own.
        factors: value of the trait -> factor.
        error_pct: median error of trials, each predicted from the others.
    """

    trait: str | None = None
    common: float = 1.0
    factors: Mapping[str, float] = field(default_factory=dict)
    error_pct: float | None = None

    def factor(self, traits: Mapping[str, str]) -> float:
        """Return the factor for a candidate with these traits."""
        return self.factors.get(traits[self.trait], self.common) if self.trait else self.common

    def __str__(self) -> str:
        if self.trait is None:
            return f"x {self.common:.2f}" if self.common != 1 else "none"
        each = ", ".join(f"{value} x {factor:.2f}" for value, factor in sorted(self.factors.items()))
        return f"by {self.trait}: {each}, others x {self.common:.2f}"


def fit_correction(observed: Sequence[Observed]) -> Correction:
    """Return the correction that leave-one-out finds best, the simplest unless another is clearly better."""
    if len(observed) < _FEWEST:
        return Correction()
    best, errors = Correction(), [abs(log(one.ratio)) for one in observed]
    for trait in (None, *observed[0].traits):
        left_out = _left_out_errors(observed, trait)
        if fmean(left_out) < _WORTH_A_FACTOR * fmean(errors):
            best, errors = _fit(observed, trait), left_out
    return replace(best, error_pct=100 * (exp(median(errors)) - 1))


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Kendall's tau-b of two lists: agreement of their orders, -1 to 1; None if either is constant."""
    pairs = list(combinations(range(len(first)), 2))
    signs = [(_sign(first[i] - first[j]), _sign(second[i] - second[j])) for i, j in pairs]
    ordered = [sum(sign[side] != 0 for sign in signs) for side in (0, 1)]
    if not all(ordered):
        return None
    return sum(a * b for a, b in signs) / (ordered[0] * ordered[1]) ** 0.5


def errors_pct(observed: Sequence[Observed]) -> list[float]:
    """Return the error of each prediction in percent, positive if it exceeds the measurement."""
    return [100 * (one.predicted / one.measured - 1) for one in observed]


def _fit(observed: Sequence[Observed], trait: str | None) -> Correction:
    common = median(one.ratio for one in observed)
    if trait is None:
        return Correction(None, common)
    ratios: dict[str, list[float]] = {}
    for one in observed:
        ratios.setdefault(one.traits[trait], []).append(one.ratio)
    factors = {value: median(found) for value, found in ratios.items() if len(found) >= _FEWEST}
    return Correction(trait, common, factors)


def _left_out_errors(observed: Sequence[Observed], trait: str | None) -> list[float]:
    """Return |log(predicted / measured)| of each trial, corrected by a fit to the other trials."""
    errors = []
    for number, one in enumerate(observed):
        others = [*observed[:number], *observed[number + 1 :]]
        errors.append(abs(log(_fit(others, trait).factor(one.traits) / one.ratio)))
    return errors


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
