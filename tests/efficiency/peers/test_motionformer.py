"""Tests of trajectory attention, against a loop over patches and frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from everest_ds.efficiency.peers.motionformer import TrajectoryAttention

WIDTH, HEADS, SLOTS, PLACES = 12, 2, 3, 4


def softmax_average(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return (keys @ query / math.sqrt(len(query))).softmax(dim=0) @ values


def naive_trajectory_attention(module: TrajectoryAttention, x_nD: Tensor) -> Tensor:
    q, k, v = module.qkv(x_nD).chunk(3, dim=-1)
    heads = [slice(h * WIDTH // HEADS, (h + 1) * WIDTH // HEADS) for h in range(HEADS)]
    out = [torch.cat([softmax_average(q[0, h], k[:, h], v[:, h]) for h in heads])]
    for patch in range(1, 1 + SLOTS * PLACES):
        trajectory = []
        for slot in range(SLOTS):
            of_slot = slice(1 + slot * PLACES, 1 + (slot + 1) * PLACES)
            found = [softmax_average(q[patch, h], k[of_slot, h], v[of_slot, h]) for h in heads]
            trajectory.append(torch.cat(found))
        own = trajectory[(patch - 1) // PLACES]
        query, keys_values = module.trajectory_q(own), module.trajectory_kv(torch.stack(trajectory))
        keys, values = keys_values.chunk(2, dim=-1)
        out.append(torch.cat([softmax_average(query[h], keys[:, h], values[:, h]) for h in heads]))
    return module.proj(torch.stack(out))


def test_equal_to_a_loop_over_patches_and_frames() -> None:
    torch.manual_seed(0)
    module = TrajectoryAttention(WIDTH, HEADS, SLOTS)
    x_BnD = torch.randn(2, 1 + SLOTS * PLACES, WIDTH)
    expected = torch.stack([naive_trajectory_attention(module, x) for x in x_BnD])
    torch.testing.assert_close(module(x_BnD), expected)
