"""Top-1 accuracy with its confidence interval, and the labelled features that probes learn from."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

from torch import Tensor

_Z = 1.959964  # quantile of the normal distribution for a two-sided interval of 95 %


class FeatureSet(NamedTuple):
    """The frozen features of labelled clips.

    Attributes:
        clip_ND: float32 vectors, one per clip.
        label_N: int64 labels.
        cell_NGD: float16 means of the cells of each clip, for the attentive probe; None if it does not run.
    """

    clip_ND: Tensor
    label_N: Tensor
    cell_NGD: Tensor | None = None

    def rows(self, index: Tensor) -> FeatureSet:
        """Return the features of the clips at the given indices."""
        cells = None if self.cell_NGD is None else self.cell_NGD[index]
        return FeatureSet(self.clip_ND[index], self.label_N[index], cells)

    @property
    def num_classes(self) -> int:
        """The number of classes up to the highest label."""
        return int(self.label_N.max()) + 1


class TopOne(NamedTuple):
    """The number of clips whose class was predicted correctly, and the number of all clips."""

    correct: int
    total: int

    @classmethod
    def of(cls, predicted_N: Tensor, label_N: Tensor) -> TopOne:
        """Count the correct predictions."""
        return cls(int((predicted_N == label_N).sum()), len(label_N))

    @property
    def pct(self) -> float:
        """The accuracy in percent."""
        return 100 * self.correct / self.total

    @property
    def interval_pct(self) -> tuple[float, float]:
        """Wilson's score interval of the accuracy at 95 %, in percent (Wilson, JASA 1927)."""
        share, z2 = self.correct / self.total, _Z**2 / self.total
        half = sqrt(z2 * (share * (1 - share) + z2 / 4))
        low, high = ((share + z2 / 2 + sign * half) / (1 + z2) for sign in (-1, 1))
        return 100 * max(0.0, low), 100 * min(1.0, high)
