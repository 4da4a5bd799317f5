"""How much useful compute a run does a second, and what share of its devices' peak that is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClipCost:
    """What a clip costs and what a device could do, handed in by whoever starts the run.

    Attributes:
        flops: useful floating-point operations of a training step for each clip: the masked model's forward
            and backward pass, nothing that recompute repeats.
        peak_flops_per_s: of one rank's device in the run's precision; None if unknown.
    """

    flops: int
    peak_flops_per_s: float | None

    def tflops_per_s(self, clips_per_s: float, num_ranks: int) -> float:
        """Useful TFLOP/s of each rank, given the clips a second of all of them."""
        return self.flops * clips_per_s / num_ranks / 1e12

    def mfu_pct(self, clips_per_s: float, num_ranks: int) -> float | None:
        """Model FLOPs utilisation, in per cent of the peak; None for an unknown device."""
        if self.peak_flops_per_s is None:
            return None
        return 100 * self.tflops_per_s(clips_per_s, num_ranks) * 1e12 / self.peak_flops_per_s
