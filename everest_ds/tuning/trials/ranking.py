"""The ranking of candidates after trials, by measured figures or, without a trial, corrected predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.trials.correction import Correction, Observed, errors_pct, fit_correction, kendall_tau
from everest_ds.units import format_bytes

CLOSE_PCT = 8  # the remark `close` marks a candidate with less memory left than this share


@dataclass(frozen=True)
class RankedCandidate:
    """A candidate with the figures that rank it after the trials.

    Attributes:
        candidate: the candidate, with its trial.
        step_s: step time, measured or else predicted and corrected.
        peak_bytes: peak memory, measured or else predicted and corrected.
        refused: why it must not be recommended; "" if it may be.
        remarks: says that it is a baseline, or that memory is nearly full.
    """

    candidate: Candidate
    step_s: float
    peak_bytes: float
    refused: str
    remarks: str

    @property
    def clips_per_s(self) -> float:
        """Return the clips per second of all ranks."""
        return self.candidate.step.clips / self.step_s


@dataclass(frozen=True)
class TrialResults:
    """The outcome of all trials.

    Attributes:
        ranked: candidates, best first; refused ones at the end.
        time: correction of predicted step times.
        memory: correction of predicted peak memory.
        time_errors_pct: signed errors of the uncorrected time predictions.
        memory_errors_pct: signed errors of the uncorrected memory predictions.
        tau: agreement of predicted and measured order (Kendall's tau).
    """

    ranked: Sequence[RankedCandidate]
    time: Correction
    memory: Correction
    time_errors_pct: Sequence[float] = field(default_factory=list)
    memory_errors_pct: Sequence[float] = field(default_factory=list)
    tau: float | None = None

    @property
    def recommended(self) -> RankedCandidate | None:
        """Return the fastest candidate that was measured and not refused, or None."""
        return next((one for one in self.ranked if one.candidate.measured and not one.refused), None)


def rank_candidates(candidates: Sequence[Candidate], memory_bytes: int) -> TrialResults:
    """Correct the predictions by the trials and rank all candidates again.

    Args:
        candidates: all candidates, tried or not.
        memory_bytes: memory that a rank may use.
    """
    ran = [(one, one.measured) for one in candidates if one.measured]
    times = [Observed(one.traits, one.step.step_s, trial.step_s) for one, trial in ran if trial.step_s]
    peaks = [
        Observed(one.traits, one.needed_bytes, trial.peak_bytes) for one, trial in ran if trial.peak_bytes
    ]
    time, memory = fit_correction(times), fit_correction(peaks)
    # The smallest corrected memory prediction of a candidate that ran out of memory.
    out_of_memory = [one for one in candidates if one.trial and one.trial.outcome == "oom"]
    failed_at = min((_corrected_bytes(one, memory) for one in out_of_memory), default=float("inf"))
    ranked = [_rank(one, time, memory, memory_bytes, failed_at) for one in candidates]
    return TrialResults(
        sorted(ranked, key=lambda one: (bool(one.refused), one.step_s)),
        time,
        memory,
        errors_pct(times),
        errors_pct(peaks),
        kendall_tau([one.predicted for one in times], [one.measured for one in times]),
    )


def pareto_front(ranked: Sequence[RankedCandidate]) -> list[RankedCandidate]:
    """Return the usable candidates that no other beats in both speed and memory, smallest first."""
    front: list[RankedCandidate] = []
    usable = (one for one in ranked if not one.refused)
    for one in sorted(usable, key=lambda each: (each.peak_bytes, -each.clips_per_s)):
        if not front or one.clips_per_s > front[-1].clips_per_s:
            front.append(one)
    return front


def _rank(
    one: Candidate, time: Correction, memory: Correction, memory_bytes: int, failed_at: float
) -> RankedCandidate:
    """Return a candidate with its measured figures, or else with corrected predictions."""
    trial = one.measured
    if trial and trial.step_s and trial.peak_bytes:
        step_s, peak, refused = trial.step_s, float(trial.peak_bytes), ""
    else:
        step_s, peak = time.factor(one.traits) * one.step.step_s, _corrected_bytes(one, memory)
        refused = _refusal(one, peak, memory_bytes, failed_at)
    left = memory_bytes - peak
    baseline = f"baseline: {one.baseline}" if one.baseline else ""
    close = f"close: {format_bytes(left)} left" if 0 <= left < CLOSE_PCT / 100 * memory_bytes else ""
    remarks = "; ".join(text for text in (baseline, one.note, close) if text)
    return RankedCandidate(one, step_s, peak, refused, remarks)


def _corrected_bytes(one: Candidate, memory: Correction) -> float:
    return memory.factor(one.traits) * one.needed_bytes


def _refusal(one: Candidate, peak: float, memory_bytes: int, failed_at: float) -> str:
    """Return why a candidate without measured figures must not be recommended, or ""."""
    if one.trial:
        return f"{one.trial.outcome}: {one.trial.reason}"
    if peak > memory_bytes:
        needed = f"would need {format_bytes(peak)} of {format_bytes(memory_bytes)}"
        return f"{needed}, predicted and corrected by the trials"
    return "needs as much memory as a candidate that ran out of it" if peak >= failed_at else ""
