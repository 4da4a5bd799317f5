"""Useful compute rate and model FLOPs utilisation (MFU) of a run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipCost:
    """The compute cost of a clip and the peak rate of a device; the caller of `train` provides them.

    Attributes:
        flops: useful floating-point operations per clip in a training step: the masked model's forward and
            backward pass, without the work that recompute repeats.
        peak_flops_per_s: peak rate of one rank's device in the run's precision; None if unknown.
    """

    flops: int
    peak_flops_per_s: float | None

    def tflops_per_s(self, clips_per_s: float, num_ranks: int) -> float:
        """Return the useful TFLOP/s per rank, given the clips per second of all ranks."""
        return self.flops * clips_per_s / num_ranks / 1e12

    def mfu_pct(self, clips_per_s: float, num_ranks: int) -> float | None:
        """Return the model FLOPs utilisation in per cent of the peak rate; None for an unknown device."""
        if self.peak_flops_per_s is None:
            return None
        return 100 * self.tflops_per_s(clips_per_s, num_ranks) * 1e12 / self.peak_flops_per_s
