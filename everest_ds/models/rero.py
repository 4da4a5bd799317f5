"""ReRo, redundancy-robust token selection: THE selector, one for pre-training and fine-tuning.

A token matters as much as its tubelet changed: its importance is the distance between its embedding
and that of the tubelet one slot earlier at the same place (EVEREST, ICML 2024, section 3). Selection
returns index tensors of a fixed size, so everything downstream has static shapes.

Shape legend: B clips, T slots, L places a slot, N = T·L tokens, K kept, V visible, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from everest_ds.models.sampling import random_permutation

# Streams of per-clip randomness (see sampling.random_bits). Drop path uses those from 16 on.
VISIBLE_STREAM = 0
TUBE_STREAM = 1


def token_importance(embedding_BND: Tensor, num_slots: int) -> Tensor:
    """How much each token differs from its predecessor in time.

    Args:
        embedding_BND: patch embeddings without positions; tokens slot by slot.
        num_slots: T, at least 2.

    Returns:
        (B, N) L2 distances. Slot 0 has no predecessor and takes slot 1's (released EVEREST code).
    """
    embedding_BTLD = embedding_BND.unflatten(1, (num_slots, -1))
    change = (embedding_BTLD[:, 1:] - embedding_BTLD[:, :-1]).float().norm(dim=-1)
    return torch.cat([change[:, :1], change], dim=1).flatten(1)


def select_tokens(importance_BN: Tensor, num_kept: int) -> Tensor:
    """Indices of the K most important tokens of each clip, over the whole clip, in ascending order.

    Ties go to the earlier token, so that still clips (all distances zero) select the same on any device.

    Returns:
        int64 (B, K).
    """
    by_importance = importance_BN.argsort(dim=1, descending=True, stable=True)
    return by_importance[:, :num_kept].sort(dim=1).values


def split_kept(keep_BK: Tensor, num_visible: int, key_B: Tensor) -> tuple[Tensor, Tensor]:
    """Split the kept tokens into a uniform random visible subset and the rest, to be predicted.

    Returns:
        int64 (B, V) and (B, K - V) token indices, each ascending.
    """
    order = random_permutation(key_B, VISIBLE_STREAM, keep_BK.shape[1])
    visible = keep_BK.gather(1, order[:, :num_visible])
    predicted = keep_BK.gather(1, order[:, num_visible:])
    return visible.sort(dim=1).values, predicted.sort(dim=1).values


def split_tubes(
    num_slots: int, tokens_per_slot: int, num_visible: int, key_B: Tensor
) -> tuple[Tensor, Tensor]:
    """VideoMAE's tube mask: the same random places are visible in every slot; all others are predicted.

    Returns:
        int64 (B, V) and (B, N - V) token indices, each ascending.
    """
    order = random_permutation(key_B, TUBE_STREAM, tokens_per_slot)
    places_per_slot = num_visible // num_slots
    slot_start = torch.arange(num_slots, device=key_B.device)[:, None] * tokens_per_slot

    def in_every_slot(place: Tensor) -> Tensor:
        return (slot_start + place.sort(dim=1).values[:, None]).flatten(1)

    return in_every_slot(order[:, :places_per_slot]), in_every_slot(order[:, places_per_slot:])
