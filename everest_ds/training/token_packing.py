"""ReRo token selection in the loader's workers, so that only kept tubelets reach the rank and its device.

Packing is possible only for the score that needs no weights (`tokens.score=pixel`). The selection is the
model's own function, so on a CPU training computes exactly the same with and without packing. A GPU sums
scores in another order and may break a near tie differently.

Shape legend: B clips, F frames, H x W pixels, N tokens, K kept tokens, P values of a tubelet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.config.tokens import ClipGeometry
from everest_ds.data.clips import PackedBatch
from everest_ds.models.selection.rero import select_tokens, token_importance
from everest_ds.models.tubelets import from_tubelets, gather_tokens, to_tubelets


class Packer:
    """A callable that replaces a clip by its kept tubelets and their indices."""

    def __init__(self, config: Experiment) -> None:
        self.geometry = config.model.geometry
        self.distance = config.tokens.distance
        self.num_kept = config.token_counts.num_kept

    @torch.no_grad()
    def __call__(self, clip_FHWC: Tensor) -> tuple[Tensor, Tensor]:
        """Pack a clip: uint8 (F, H, W, 3) -> tubelets uint8 (K, P) and ascending indices int32 (K,)."""
        pixels_1NP = to_tubelets(clip_FHWC[None], self.geometry)
        scores = token_importance(pixels_1NP, self.geometry.num_slots, None, self.distance)
        keep_1K = select_tokens(scores, self.num_kept)
        return gather_tokens(pixels_1NP, keep_1K)[0], keep_1K[0].int()


def unpack(batch: PackedBatch, geometry: ClipGeometry) -> PackedBatch:
    """Restore the clips of a packed batch on its device.

    Discarded tubelets are black; the model does not read them.
    """
    tubelets_BKP, keep_BK = batch.clip, batch.kept.long()
    pixels_BNP = tubelets_BKP.new_zeros(len(tubelets_BKP), geometry.num_tokens, tubelets_BKP.shape[2])
    pixels_BNP.scatter_(1, keep_BK[:, :, None].expand_as(tubelets_BKP), tubelets_BKP)
    return batch._replace(clip=from_tubelets(pixels_BNP, geometry), kept=keep_BK)
