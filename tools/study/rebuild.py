"""A judge of kept tokens without a model: the clip rebuilt from them, compared where it moves.

Shape legend: B clips, F frames, H x W pixels, T slots, L places per slot, N = T·L tokens, K kept tokens, P
values of a tubelet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.tubelets import MIDDLE_GREY, from_tubelets, gather_tokens, to_tubelets

MOVING_LEVELS = 10  # mean change over the colours since the frame before, above which a pixel moves


def moving_error(clip_BFHWC: Tensor, keep_BK: Tensor, geometry: ClipGeometry) -> Tensor:
    """Return the root-mean-square error of the rebuilt clips over their moving pixels, in levels: (B,).

    A pixel of a frame moves if it differs from the frame before by more than `MOVING_LEVELS`. A clip in which
    no pixel moves has an error of 0.
    """
    clip = clip_BFHWC.float()
    moving_BFHW = (clip[:, 1:] - clip[:, :-1]).abs().mean(dim=-1) > MOVING_LEVELS
    square_BFHW = (rebuilt(clip_BFHWC, keep_BK, geometry).float() - clip).square().mean(dim=-1)[:, 1:]
    total_B = (square_BFHW * moving_BFHW).sum(dim=(1, 2, 3))
    return (total_B / moving_BFHW.sum(dim=(1, 2, 3)).clamp(min=1)).sqrt()


def rebuilt(clip_BFHWC: Tensor, keep_BK: Tensor, geometry: ClipGeometry) -> Tensor:
    """Rebuild clips from their kept tokens: uint8 (B, F, H, W, 3).

    Each place shows its most recent kept tubelet, before that its first one, and grey if it has none.
    """
    pixels_BNP = to_tubelets(clip_BFHWC, geometry)
    num_slots, places = geometry.num_slots, geometry.tokens_per_slot
    kept_BN = torch.zeros(pixels_BNP.shape[:2], dtype=torch.bool).scatter(1, keep_BK, True)
    kept_BTL = kept_BN.unflatten(1, (num_slots, places))
    slot_T1 = torch.arange(num_slots)[:, None]
    latest_BTL = torch.where(kept_BTL, slot_T1, -1).cummax(dim=1).values
    first_B1L = torch.where(kept_BTL, slot_T1, num_slots - 1).amin(dim=1, keepdim=True)
    source_BTL = torch.where(latest_BTL >= 0, latest_BTL, first_B1L)
    shown = gather_tokens(pixels_BNP, (source_BTL * places + torch.arange(places)).flatten(1))
    never_BTL = ~kept_BTL.any(dim=1, keepdim=True).expand_as(kept_BTL)
    return from_tubelets(shown.masked_fill(never_BTL.flatten(1)[..., None], MIDDLE_GREY), geometry)
