"""Selection of the frames and tokens that a model computes on, as the config defines it.

Shape legend: B clips, S candidate slots, T slots, N tokens, K kept, V visible, M predicted, P values of one
tubelet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.config.tokens import exact_floor
from everest_ds.models.selection.frames import draw_slots, gather_slots, tokens_per_slot
from everest_ds.models.selection.masks import random_tokens, split_dual, split_kept, split_tubes
from everest_ds.models.selection.rero import score_map, select_tokens, token_importance
from everest_ds.models.tubelets import PixelMap, to_tubelets

_TUBES = {"tube": split_tubes, "dual": split_dual}


class KeptTokens(NamedTuple):
    """Tubelets of a batch of clips, and the indices of their kept tokens.

    Attributes:
        pixels_BNP: uint8 tubelets of the T slots that the model sees.
        slots_BT: indices of these slots among the candidate slots.
        keep_BK: indices of the kept tokens, ascending; all tokens for `none`, `tube` and `dual`.
    """

    pixels_BNP: Tensor
    slots_BT: Tensor
    keep_BK: Tensor


class TokenSplit(NamedTuple):
    """Tubelets of a batch of clips, and the indices of their visible and predicted tokens.

    Attributes:
        pixels_BNP: uint8 tubelets of the T slots that the model sees.
        slots_BT: indices of these slots among the candidate slots.
        visible_BV: indices of the tokens for the encoder, ascending.
        predicted_BM: indices of the tokens to predict, ascending; none in fine-tuning.
    """

    pixels_BNP: Tensor
    slots_BT: Tensor
    visible_BV: Tensor
    predicted_BM: Tensor


class Selector(nn.Module):
    """Frame and token selection of pre-training and fine-tuning, without weights or gradient.

    The selector is a module rather than a function so that profilers report its share of a step by name.
    """

    def __init__(self, config: Experiment) -> None:
        super().__init__()
        self.tokens = config.tokens
        self.geometry = config.model.geometry
        self.candidates = config.candidate_geometry
        self.counts = config.token_counts

    @torch.no_grad()
    def forward(
        self, clip_BFHWC: Tensor, embedding: PixelMap, key_B: Tensor, keep_BK: Tensor | None = None
    ) -> TokenSplit:
        """Select frames and tokens from uint8 clips of S candidate slots.

        Args:
            clip_BFHWC: uint8 RGB clips.
            embedding: the patch embedding in this step, which ReRo may score with.
            key_B: int64 random keys, one per clip.
            keep_BK: indices of the kept tokens, if the loader has already chosen them.
        """
        pixels_BNP, slots_BT, keep_BK = self.kept(clip_BFHWC, embedding, key_B, keep_BK)
        if self.tokens.selection in _TUBES:
            split = _TUBES[self.tokens.selection](self.geometry, self.counts.num_visible, key_B)
        else:
            split = split_kept(keep_BK, self.counts.num_visible, key_B)
        return TokenSplit(pixels_BNP, slots_BT, *split)

    @torch.no_grad()
    def kept(
        self, clip_BFHWC: Tensor, embedding: PixelMap, key_B: Tensor, keep_BK: Tensor | None = None
    ) -> KeptTokens:
        """Select frames and kept tokens, without splitting them into visible and predicted tokens.

        Args:
            clip_BFHWC: uint8 RGB clips of S candidate slots.
            embedding: the patch embedding in this step, which ReRo may score with.
            key_B: int64 random keys, one per clip.
            keep_BK: indices of the kept tokens, if the loader has already chosen them.
        """
        pixels_BNP, slots_BT = self._choose_slots(clip_BFHWC, embedding, key_B)
        if keep_BK is None:
            keep_BK = self._keep(pixels_BNP, embedding, key_B)
        return KeptTokens(pixels_BNP, slots_BT, keep_BK)

    def _choose_slots(self, clip_BFHWC: Tensor, embedding: PixelMap, key_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tubelets and indices of the T slots that IIFS draws from S, or of all slots if S = T."""
        pixels = to_tubelets(clip_BFHWC, self.candidates)
        num_slots, num_drawn = self.candidates.num_slots, self.geometry.num_slots
        if num_slots == num_drawn:
            return pixels, torch.arange(num_slots, device=pixels.device).expand(len(pixels), -1)
        slots_BT = draw_slots(self.count_tokens(pixels, embedding), num_drawn, key_B)
        return gather_slots(pixels, slots_BT, self.geometry.tokens_per_slot), slots_BT

    def count_tokens(self, candidates_BNP: Tensor, embedding: PixelMap) -> Tensor:
        """Count the ReRo tokens in each candidate slot: (B, S)."""
        num_slots, num_tokens = self.candidates.num_slots, self.candidates.num_tokens
        num_kept = exact_floor(self.tokens.keep_ratio, num_tokens)
        keep_BK = select_tokens(self.importance(candidates_BNP, num_slots, embedding), num_kept)
        return tokens_per_slot(keep_BK, num_slots, self.geometry.tokens_per_slot)

    def _keep(self, pixels_BNP: Tensor, embedding: PixelMap, key_B: Tensor) -> Tensor:
        """Return the indices (B, K) of the kept tokens, ascending."""
        counts = self.counts
        if self.tokens.selection == "rero":
            return select_tokens(
                self.importance(pixels_BNP, self.geometry.num_slots, embedding), counts.num_kept
            )
        if self.tokens.selection == "random":
            return random_tokens(counts.num_tokens, counts.num_kept, key_B)
        return torch.arange(counts.num_tokens, device=key_B.device).expand(len(key_B), -1)

    def importance(self, pixels_BNP: Tensor, num_slots: int, embedding: PixelMap) -> Tensor:
        """Compute the ReRo importance (B, N) with the configured score and distance."""
        score = score_map(self.tokens.score, embedding)
        return token_importance(pixels_BNP, num_slots, score, self.tokens.distance)
