"""ReRo token selection in the loader's workers, which have no weights of the model.

It is possible for the scores that need none: `pixel`, so that only kept tubelets reach the rank and its
device, and `codec`, whose motion vectors only the workers have. With `pixel`, the selection is the model's
own function, so on a CPU training computes exactly the same with and without packing. A GPU sums scores in
another order and may break a near tie differently.

Shape legend: F frames, H x W pixels, T slots, G x G places, N tokens, K kept tokens, P values of a tubelet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.models.selection.codec import codec_importance
from everest_ds.models.selection.rero import select_tokens, token_importance
from everest_ds.models.tubelets import gather_tokens, to_tubelets


class Packer:
    """A callable that selects the tokens of a clip, and may replace the clip by their tubelets.

    Attributes:
        keeps_clips: True if clips stay whole.
    """

    def __init__(self, config: Experiment, keeps_clips: bool = False) -> None:
        self.keeps_clips = keeps_clips
        self.geometry = config.model.geometry
        self.distance = config.tokens.distance
        self.num_kept = config.token_counts.num_kept

    @torch.no_grad()
    def __call__(self, clip_FHWC: Tensor, moved_TGG2: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Select the tokens of a clip.

        Args:
            clip_FHWC: uint8 clip.
            moved_TGG2: for the codec score, how far tubelets have moved (data/transforms.py, `crop_motion`).

        Returns:
            The tubelets uint8 (K, P), or the clip if it stays whole, and the ascending indices int32 (K,).
        """
        if moved_TGG2 is not None:
            scores_1N = codec_importance(clip_FHWC, moved_TGG2, self.geometry)[None]
            keep_1K = select_tokens(scores_1N, self.num_kept)
            if self.keeps_clips:
                return clip_FHWC, keep_1K[0].int()
        pixels_1NP = to_tubelets(clip_FHWC[None], self.geometry)
        if moved_TGG2 is None:
            scores_1N = token_importance(pixels_1NP, self.geometry.num_slots, None, self.distance)
            keep_1K = select_tokens(scores_1N, self.num_kept)
        return gather_tokens(pixels_1NP, keep_1K)[0], keep_1K[0].int()


def evaluation_packer(config: Experiment) -> Packer | None:
    """Return what selects the tokens of evaluation views in the loader; None if the model does."""
    return Packer(config, keeps_clips=True) if config.tokens.reads_motion else None
