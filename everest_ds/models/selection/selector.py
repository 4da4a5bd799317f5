"""Selection of the frames and tokens that a model computes on, as the config defines it.

Shape legend: B clips, S candidate slots, T slots, N tokens, K kept, V visible, M predicted, P values of one
tubelet.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from everest_ds.config.schema import Experiment
from everest_ds.config.selections import SELECTIONS
from everest_ds.config.tokens import ClipGeometry, TokenCounts, exact_floor
from everest_ds.errors import UsageError
from everest_ds.models.selection.masks import random_tokens, split_dual, split_kept, split_tubes, whole_slots
from everest_ds.models.selection.rero import score_map, select_tokens, token_importance
from everest_ds.models.selection.run_length import run_change
from everest_ds.models.selection.slots import draw_slots, gather_slots, tokens_per_slot
from everest_ds.models.tubelets import PixelMap, to_tubelets


class KeptTokens(NamedTuple):
    """Tubelets of a batch of clips, and the indices of their kept tokens.

    Attributes:
        pixels_BNP: uint8 tubelets of the T slots that the model sees.
        slots_BT: indices of these slots among the candidate slots.
        keep_BK: indices of the kept tokens, ascending; all tokens for `none` and, in pre-training, for `tube`
            and `dual`.
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


class RuleInput(NamedTuple):
    """A batch of clips, in the form that the functions of a selection rule take.

    Attributes:
        pixels_BNP: uint8 tubelets.
        key_B: int64 random keys, one per clip.
        geometry: tubelet grid of a clip.
        counts: numbers of tokens to keep and to show.
        importance: computes the importance (B, N) of the tokens, with the configured score and distance.
    """

    pixels_BNP: Tensor
    key_B: Tensor
    geometry: ClipGeometry
    counts: TokenCounts
    importance: Callable[[], Tensor]


def keep_most_important(clips: RuleInput) -> Tensor:
    """Keep the K tokens that change most."""
    return select_tokens(clips.importance(), clips.counts.num_kept)


def keep_at_random(clips: RuleInput) -> Tensor:
    """Keep K tokens at random."""
    return random_tokens(clips.counts.num_tokens, clips.counts.num_kept, clips.key_B)


def keep_run_starts(clips: RuleInput) -> Tensor:
    """Keep the first slot and, of the later tokens, those that differ most from their run."""
    return select_tokens(run_change(clips.pixels_BNP, clips.geometry), clips.counts.num_kept)


def keep_slots(clips: RuleInput) -> Tensor:
    """Keep the tokens of evenly spaced slots."""
    return whole_slots(clips.geometry, clips.counts.num_kept, clips.key_B)


def keep_tubes(clips: RuleInput) -> Tensor:
    """Keep the places in fine-tuning that VideoMAE's mask would show, and all tokens in pre-training."""
    if clips.counts.num_predicted:
        return keep_all(clips)
    return split_tubes(clips.geometry, clips.counts.num_kept, clips.key_B)[0]


def keep_all(clips: RuleInput) -> Tensor:
    """Keep all N tokens."""
    return torch.arange(clips.counts.num_tokens, device=clips.key_B.device).expand(len(clips.key_B), -1)


def show_at_random(clips: RuleInput, keep_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Show V of the kept tokens at random and predict the others."""
    return split_kept(keep_BK, clips.counts.num_visible, clips.key_B)


def show_tubes(clips: RuleInput, keep_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Show VideoMAE's random tubes and predict the others; in fine-tuning, show all kept tokens."""
    if not clips.counts.num_predicted:
        return show_at_random(clips, keep_BK)
    return split_tubes(clips.geometry, clips.counts.num_visible, clips.key_B)


def show_tubes_predict_cells(clips: RuleInput, keep_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Show VideoMAE v2's random tubes and predict its running cells."""
    return split_dual(clips.geometry, clips.counts.num_visible, clips.key_B)


class Rule(NamedTuple):
    """The functions of a selection rule.

    Attributes:
        keep: returns the indices (B, K) of the kept tokens, ascending.
        split: splits the kept tokens into visible (B, V) and predicted (B, M) ones, ascending.
    """

    keep: Callable[[RuleInput], Tensor] = keep_all
    split: Callable[[RuleInput, Tensor], tuple[Tensor, Tensor]] = show_at_random


_FUNCTIONS = {
    "rero": Rule(keep_most_important),
    "random": Rule(keep_at_random),
    "rlt": Rule(keep_run_starts),
    "uniform": Rule(keep_slots),
    "tube": Rule(keep_tubes, show_tubes),
    "dual": Rule(split=show_tubes_predict_cells),
    "none": Rule(),
}
RULES = {name: _FUNCTIONS[name] for name in SELECTIONS}  # a KeyError here means that a rule has no functions


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
        self.rule = RULES[config.tokens.selection]

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
        split = self.rule.split(self._rule_input(pixels_BNP, embedding, key_B), keep_BK)
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
            keep_BK = self.rule.keep(self._rule_input(pixels_BNP, embedding, key_B))
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

    def _rule_input(self, pixels_BNP: Tensor, embedding: PixelMap, key_B: Tensor) -> RuleInput:
        """Return the clips in the form that the functions of the rule take."""
        importance = partial(self.importance, pixels_BNP, self.geometry.num_slots, embedding)
        return RuleInput(pixels_BNP, key_B, self.geometry, self.counts, importance)

    def importance(self, pixels_BNP: Tensor, num_slots: int, embedding: PixelMap) -> Tensor:
        """Compute the ReRo importance (B, N) with the configured score and distance.

        Raises:
            UsageError: if only the loader's workers can compute this score.
        """
        if self.tokens.score_kind.reads_motion:
            raise UsageError(
                f"tokens.score={self.tokens.score} selects tokens by motion vectors, which clips do not hold",
                fix="give the kept tokens to the model: model(*read_clip(video, model.config).arguments)",
            )
        score = score_map(self.tokens.score, embedding)
        return token_importance(pixels_BNP, num_slots, score, self.tokens.distance)
