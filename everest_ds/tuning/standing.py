"""Candidates in a new order, after trials: measured where they ran, else predicted and corrected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from everest_ds.tuning.correction import Correction, Observed, errors_pct, fit_correction, kendall_tau
from everest_ds.tuning.trials import Trial
from everest_ds.units import format_bytes

CLOSE_PCT = 8  # of memory left over, below which it is said


@dataclass(frozen=True)
class Tried:
    """A candidate as the cost model sees it, and its trial if it had one.

    Attributes:
        baseline: the name of the baseline that it is, or "".
        note: for people, such as how the baseline differs from its name.
    """

    name: str
    overrides: tuple[str, ...]
    traits: Mapping[str, str]
    clips: int
    predicted_s: float
    predicted_bytes: int
    trial: Trial | None = None
    baseline: str = ""
    note: str = ""

    @property
    def measured(self) -> Trial | None:
        """The trial, if it came to an end."""
        return self.trial if self.trial and self.trial.outcome == "measured" else None


@dataclass(frozen=True)
class Standing:
    """A candidate after the trials.

    Attributes:
        step_s, peak_bytes: measured, or predicted and corrected.
        refused: why it is not to be recommended; "" if nothing speaks against it.
        note: that it is a baseline, or that memory is nearly full.
    """

    tried: Tried
    step_s: float
    peak_bytes: float
    refused: str
    note: str

    @property
    def clips_per_s(self) -> float:
        """Of all ranks."""
        return self.tried.clips / self.step_s


@dataclass(frozen=True)
class Result:
    """All that the trials say.

    Attributes:
        standings: best first; those that are refused at the end.
        time, memory: how predictions were corrected.
        time_errors_pct, memory_errors_pct: of predictions as they were, signed.
        tau: agreement of predicted and measured order.
    """

    standings: Sequence[Standing]
    time: Correction
    memory: Correction
    time_errors_pct: Sequence[float] = field(default_factory=list)
    memory_errors_pct: Sequence[float] = field(default_factory=list)
    tau: float | None = None

    @property
    def recommended(self) -> Standing | None:
        """The fastest that has run."""
        ran = (standing for standing in self.standings if standing.tried.measured and not standing.refused)
        return next(ran, None)


def weigh(candidates: Sequence[Tried], memory_bytes: int) -> Result:
    """Correct the model by the trials and rank all candidates again.

    Args:
        memory_bytes: what a rank may use.
    """
    ran = [(one, one.measured) for one in candidates if one.measured]
    times = [Observed(one.traits, one.predicted_s, trial.step_s) for one, trial in ran if trial.step_s]
    peaks = [
        Observed(one.traits, one.predicted_bytes, trial.peak_bytes) for one, trial in ran if trial.peak_bytes
    ]
    time, memory = fit_correction(times), fit_correction(peaks)
    failed_at = _least_that_failed(candidates, memory)
    standings = [_stand(one, time, memory, memory_bytes, failed_at) for one in candidates]
    return Result(
        sorted(standings, key=lambda standing: (bool(standing.refused), standing.step_s)),
        time,
        memory,
        errors_pct(times),
        errors_pct(peaks),
        kendall_tau([one.predicted for one in times], [one.measured for one in times]),
    )


def _least_that_failed(candidates: Sequence[Tried], memory: Correction) -> float:
    """The smallest corrected prediction of a candidate that ran out of memory."""
    out = [one for one in candidates if one.trial and one.trial.outcome == "oom"]
    return min((memory.factor(one.traits) * one.predicted_bytes for one in out), default=float("inf"))


def _stand(one: Tried, time: Correction, memory: Correction, memory_bytes: int, failed_at: float) -> Standing:
    trial = one.measured
    if trial and trial.step_s and trial.peak_bytes:
        return Standing(one, trial.step_s, trial.peak_bytes, "", _said(one, trial.peak_bytes, memory_bytes))
    step_s = time.factor(one.traits) * one.predicted_s
    peak = memory.factor(one.traits) * one.predicted_bytes
    refused = _refusal(one, peak, memory_bytes, failed_at)
    return Standing(one, step_s, peak, refused, _said(one, peak, memory_bytes))


def _refusal(one: Tried, peak: float, memory_bytes: int, failed_at: float) -> str:
    if one.trial:
        return f"{one.trial.outcome}: {one.trial.reason}"
    if peak > memory_bytes:
        return f"would need {format_bytes(peak)} of {format_bytes(memory_bytes)}, as the trials show"
    return "needs as much memory as one that ran out of it" if peak >= failed_at else ""


def _said(one: Tried, peak: float, memory_bytes: int) -> str:
    left = memory_bytes - peak
    baseline = f"baseline: {one.baseline}" if one.baseline else ""
    close = f"close: {format_bytes(left)} left" if 0 <= left < CLOSE_PCT / 100 * memory_bytes else ""
    return "; ".join(text for text in (baseline, one.note, close) if text)


def pareto_front(standings: Sequence[Standing]) -> list[Standing]:
    """Those that no other beats in both speed and memory, smallest first; refused ones do not count."""
    front: list[Standing] = []
    usable = (standing for standing in standings if not standing.refused)
    for standing in sorted(usable, key=lambda one: (one.peak_bytes, -one.clips_per_s)):
        if not front or standing.clips_per_s > front[-1].clips_per_s:
            front.append(standing)
    return front
