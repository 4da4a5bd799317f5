"""The ranking of candidates after trials, by measured figures or, without a trial, corrected predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from everest_ds.tuning.trials.correction import Correction, Observed, errors_pct, fit_correction, kendall_tau
from everest_ds.tuning.trials.record import Trial
from everest_ds.units import format_bytes

CLOSE_PCT = 8  # the note `close` marks a candidate with less memory left than this share


@dataclass(frozen=True)
class Tried:
    """A candidate with its predictions, and its trial if it had one.

    Attributes:
        baseline: the name of the baseline that it is, or "".
        note: human-readable note, such as how the baseline differs from its name.
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
        """Return the trial if it ended with a measurement, otherwise None."""
        return self.trial if self.trial and self.trial.outcome == "measured" else None


@dataclass(frozen=True)
class Standing:
    """A ranked candidate after the trials.

    Attributes:
        tried: the candidate, with its trial.
        step_s: step time, measured or else predicted and corrected.
        peak_bytes: peak memory, measured or else predicted and corrected.
        refused: why it must not be recommended; "" if it may be.
        note: says that it is a baseline, or that memory is nearly full.
    """

    tried: Tried
    step_s: float
    peak_bytes: float
    refused: str
    note: str

    @property
    def clips_per_s(self) -> float:
        """Return the clips per second of all ranks."""
        return self.tried.clips / self.step_s


@dataclass(frozen=True)
class TrialResults:
    """The outcome of all trials.

    Attributes:
        standings: candidates, best first; refused ones at the end.
        time: correction of predicted step times.
        memory: correction of predicted peak memory.
        time_errors_pct: signed errors of the uncorrected time predictions.
        memory_errors_pct: signed errors of the uncorrected memory predictions.
        tau: agreement of predicted and measured order (Kendall's tau).
    """

    standings: Sequence[Standing]
    time: Correction
    memory: Correction
    time_errors_pct: Sequence[float] = field(default_factory=list)
    memory_errors_pct: Sequence[float] = field(default_factory=list)
    tau: float | None = None

    @property
    def recommended(self) -> Standing | None:
        """Return the fastest candidate that was measured and not refused, or None."""
        ran = (standing for standing in self.standings if standing.tried.measured and not standing.refused)
        return next(ran, None)


def weigh(candidates: Sequence[Tried], memory_bytes: int) -> TrialResults:
    """Correct the predictions by the trials and rank all candidates again.

    Args:
        candidates: all candidates, tried or not.
        memory_bytes: memory that a rank may use.
    """
    ran = [(one, one.measured) for one in candidates if one.measured]
    times = [Observed(one.traits, one.predicted_s, trial.step_s) for one, trial in ran if trial.step_s]
    peaks = [
        Observed(one.traits, one.predicted_bytes, trial.peak_bytes) for one, trial in ran if trial.peak_bytes
    ]
    time, memory = fit_correction(times), fit_correction(peaks)
    failed_at = _least_that_failed(candidates, memory)
    standings = [_stand(one, time, memory, memory_bytes, failed_at) for one in candidates]
    return TrialResults(
        sorted(standings, key=lambda standing: (bool(standing.refused), standing.step_s)),
        time,
        memory,
        errors_pct(times),
        errors_pct(peaks),
        kendall_tau([one.predicted for one in times], [one.measured for one in times]),
    )


def _least_that_failed(candidates: Sequence[Tried], memory: Correction) -> float:
    """Return the smallest corrected memory prediction of a candidate that ran out of memory."""
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
        needed = f"would need {format_bytes(peak)} of {format_bytes(memory_bytes)}"
        return f"{needed}, predicted and corrected by the trials"
    return "needs as much memory as a candidate that ran out of it" if peak >= failed_at else ""


def _said(one: Tried, peak: float, memory_bytes: int) -> str:
    left = memory_bytes - peak
    baseline = f"baseline: {one.baseline}" if one.baseline else ""
    close = f"close: {format_bytes(left)} left" if 0 <= left < CLOSE_PCT / 100 * memory_bytes else ""
    return "; ".join(text for text in (baseline, one.note, close) if text)


def pareto_front(standings: Sequence[Standing]) -> list[Standing]:
    """Return the usable candidates that no other beats in both speed and memory, smallest first."""
    front: list[Standing] = []
    usable = (standing for standing in standings if not standing.refused)
    for standing in sorted(usable, key=lambda one: (one.peak_bytes, -one.clips_per_s)):
        if not front or standing.clips_per_s > front[-1].clips_per_s:
            front.append(standing)
    return front
