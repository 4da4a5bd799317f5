"""Information-intensive frame selection (IIFS): drawing the slots with most motion from a longer clip.

IIFS is meant for long, uncurated video (EVEREST, ICML 2024, section 3): a clip arrives with alpha·T candidate
slots; slot i holds c_i of its ReRo tokens; T slots are drawn without replacement with probabilities c_i / Σc
and stay in temporal order. The released repository does not contain this method.

The drawn slots form the clip: they take the positions 0 .. T - 1, not the positions of their times, because
the fixed position table has T slots, pre-trained weights know no others, and the frame stride of a plain clip
also differs between recipes. ReRo compares each drawn slot with the drawn slot before it, as the model sees
them.

Shape legend: B clips, S candidate slots, T slots, L places per slot, P values of one tubelet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.models.sampling import random_uniform
from everest_ds.models.selection.masks import FRAME_STREAM
from everest_ds.models.tubelets import gather_tokens


def tokens_per_slot(keep_BK: Tensor, num_slots: int, places: int) -> Tensor:
    """Count the kept tokens in each slot: int64 (B, S)."""
    slot = torch.arange(num_slots, device=keep_BK.device)
    return (keep_BK[:, :, None] // places == slot).sum(dim=1)


def draw_slots(count_BS: Tensor, num_drawn: int, key_B: Tensor) -> Tensor:
    """Draw T slots without replacement, with probabilities proportional to the remaining counts.

    Slot i gets an exponential random time of rate c_i, and the T slots with the earliest times are taken. A
    single sort thus equals drawing slot after slot (Efraimidis and Spirakis, 2006). If fewer than T slots
    hold a token, all of these are taken and the remainder is drawn uniformly from the empty slots.

    Args:
        count_BS: number of tokens in each candidate slot, not negative.
        num_drawn: number T of slots to draw.
        key_B: int64 random keys, one per clip.

    Returns:
        int64 (B, T), ascending; a function of the counts and keys only.
    """
    uniform = 1 - random_uniform(key_B, FRAME_STREAM, count_BS.shape[1])  # in (0, 1]
    waiting = -uniform.log()
    last = waiting.max(dim=1, keepdim=True).values  # an empty slot comes after every other slot
    finish = torch.where(count_BS > 0, waiting / count_BS.clamp(min=1), last + 1 + waiting)
    return finish.argsort(dim=1, stable=True)[:, :num_drawn].sort(dim=1).values


def gather_slots(tubelets_BNP: Tensor, slots_BT: Tensor, places: int) -> Tensor:
    """Gather the tubelets of the drawn slots: (B, S·L, P) -> (B, T·L, P)."""
    clips_BSX = tubelets_BNP.unflatten(1, (-1, places)).flatten(2)
    return gather_tokens(clips_BSX, slots_BT).unflatten(2, (places, -1)).flatten(1, 2)
