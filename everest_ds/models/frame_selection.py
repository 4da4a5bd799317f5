"""IIFS, information-intensive frame selection: of more slots than the model takes, draw the busy ones.

For long, uncurated video (EVEREST, ICML 2024, section 3): a clip arrives with alpha·T candidate slots; c_i
of their ReRo tokens lie in slot i; T slots are drawn without replacement with probabilities c_i / Σc and
stay in temporal order. The released repository has no code of it.

The drawn slots are then the clip: they take the positions 0 .. T - 1 of any other clip, not those of their
times. The fixed position table has T slots, pre-trained weights have seen no others, and a plain clip
differs between recipes in its frame stride just the same. ReRo then compares each drawn slot with the
drawn one before it, as that is what the model sees.

Shape legend: B clips, S candidate slots, T slots, L places a slot, P values of a tubelet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.models.masks import FRAME_STREAM
from everest_ds.models.sampling import random_uniform
from everest_ds.models.tubelets import gather_tokens


def tokens_per_slot(keep_BK: Tensor, num_slots: int, places: int) -> Tensor:
    """How many of the kept tokens lie in each slot: int64 (B, S)."""
    slot = torch.arange(num_slots, device=keep_BK.device)
    return (keep_BK[:, :, None] // places == slot).sum(dim=1)


def draw_slots(count_BS: Tensor, num_drawn: int, key_B: Tensor) -> Tensor:
    """T slots without replacement, each draw with probability proportional to the counts left.

    Slots race: slot i finishes at an exponential time of rate c_i, and the first T are taken. That is the
    same as drawing one after the other (Efraimidis and Spirakis, 2006), in one sort. Where fewer than T
    slots have a token, those are all taken and the rest is drawn uniformly.

    Args:
        count_BS: tokens of each candidate slot, not negative.

    Returns:
        int64 (B, T), ascending; a function of counts and key alone.
    """
    uniform = 1 - random_uniform(key_B, FRAME_STREAM, count_BS.shape[1])  # in (0, 1]
    waiting = -uniform.log()
    last = waiting.max(dim=1, keepdim=True).values  # an idle slot finishes after every busy one
    finish = torch.where(count_BS > 0, waiting / count_BS.clamp(min=1), last + 1 + waiting)
    return finish.argsort(dim=1, stable=True)[:, :num_drawn].sort(dim=1).values


def gather_slots(tubelets_BNP: Tensor, slots_BT: Tensor, places: int) -> Tensor:
    """The tubelets of the drawn slots: (B, S·L, P) -> (B, T·L, P)."""
    clips_BSX = tubelets_BNP.unflatten(1, (-1, places)).flatten(2)
    return gather_tokens(clips_BSX, slots_BT).unflatten(2, (places, -1)).flatten(1, 2)
