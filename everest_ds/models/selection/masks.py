"""Masks of pre-training: the visible and the predicted tokens of a clip, for each selection.

All token counts are fixed; the choice of tokens follows from the random key of the clip.

Shape legend: B clips, T slots, L places per slot, N = T·L tokens, K kept, V visible, M predicted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.config.selections import RUNNING_CELL_PERIOD
from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.sampling import random_bits, random_permutation

# Streams of per-clip randomness (see sampling.random_bits). Drop path uses the streams from 16 on.
VISIBLE_STREAM = 0
TUBE_STREAM = 1
KEEP_STREAM = 2
CELL_STREAM = 3
FRAME_STREAM = 4


def random_tokens(num_tokens: int, num_kept: int, key_B: Tensor) -> Tensor:
    """Draw a uniform random subset of all tokens: int64 (B, K), ascending."""
    return random_permutation(key_B, KEEP_STREAM, num_tokens)[:, :num_kept].sort(dim=1).values


def whole_slots(geometry: ClipGeometry, num_kept: int, key_B: Tensor) -> Tensor:
    """Keep the tokens of ⌈K / L⌉ evenly spaced slots, less a uniform random surplus: int64 (B, K), ascending.

    Of S slots, the i-th is the one at the middle of the i-th of S equal parts of the clip.
    """
    places, num_slots = geometry.tokens_per_slot, -(-num_kept // geometry.tokens_per_slot)
    middle = (2 * torch.arange(num_slots, device=key_B.device) + 1) * geometry.num_slots // (2 * num_slots)
    chosen = random_tokens(num_slots * places, num_kept, key_B)
    return middle[chosen // places] * places + chosen % places


def split_kept(keep_BK: Tensor, num_visible: int, key_B: Tensor) -> tuple[Tensor, Tensor]:
    """Split the kept tokens into a uniform random visible subset and a remainder to predict.

    Returns:
        int64 (B, V) and (B, K - V) token indices, each ascending.
    """
    if num_visible == keep_BK.shape[1]:
        return keep_BK, keep_BK[:, :0]
    order = random_permutation(key_B, VISIBLE_STREAM, keep_BK.shape[1])
    visible = keep_BK.gather(1, order[:, :num_visible])
    predicted = keep_BK.gather(1, order[:, num_visible:])
    return visible.sort(dim=1).values, predicted.sort(dim=1).values


def split_tubes(geometry: ClipGeometry, num_visible: int, key_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw VideoMAE's tube mask: the same random places are visible in every slot, all others are predicted.

    Returns:
        int64 (B, V) and (B, N - V) token indices, each ascending.
    """
    shown, hidden = _places(geometry, num_visible, key_B)
    every_slot = torch.arange(geometry.num_slots, device=key_B.device)[:, None]
    return _tokens(every_slot, shown, geometry), _tokens(every_slot, hidden, geometry)


def split_dual(geometry: ClipGeometry, num_visible: int, key_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw VideoMAE v2's dual mask: visible tubes, and running cells that select half of the rest to predict.

    The four places of each 2x2 cell take turns over time, from a random start: each is predicted in 2 of 4
    slots (CVPR 2023, section 3.2; row by row as in its released code). Over whole periods every place is
    predicted in exactly T / 2 slots, so the count does not depend on the hidden tubes. The released decoder
    also receives mask tokens for selected places that are visible, outside the loss; this decoder does not.

    Returns:
        int64 (B, V) and (B, (N - V) / 2) token indices, each ascending.
    """
    shown, hidden = _places(geometry, num_visible, key_B)
    device, grid = key_B.device, geometry.grid_size
    row, column = hidden // grid, hidden % grid
    start = random_bits(key_B, CELL_STREAM, 1) % RUNNING_CELL_PERIOD
    turn = 2 * (row % 2) + column % 2 + start  # (B, places)
    period = torch.arange(0, geometry.num_slots, RUNNING_CELL_PERIOD, device=device)
    within = torch.arange(RUNNING_CELL_PERIOD // 2, device=device)
    # a place is predicted in two cyclically adjacent slots of each period
    slots = period[:, None, None] + (within[:, None] - turn[:, None, None]) % RUNNING_CELL_PERIOD
    predicted = slots * geometry.tokens_per_slot + hidden[:, None, None]
    every_slot = torch.arange(geometry.num_slots, device=device)[:, None]
    return _tokens(every_slot, shown, geometry), predicted.flatten(1).sort(dim=1).values


def _places(geometry: ClipGeometry, num_visible: int, key_B: Tensor) -> tuple[Tensor, Tensor]:
    """Draw the places of the grid to show and to hide: two tensors (B, places), ascending."""
    order = random_permutation(key_B, TUBE_STREAM, geometry.tokens_per_slot)
    shown = num_visible // geometry.num_slots
    return order[:, :shown].sort(dim=1).values, order[:, shown:].sort(dim=1).values


def _tokens(slot: Tensor, place: Tensor, geometry: ClipGeometry) -> Tensor:
    """Combine slots (T, 1) and places (B, n) into token indices (B, T·n), slot by slot."""
    return (slot * geometry.tokens_per_slot + place[:, None]).flatten(1)
