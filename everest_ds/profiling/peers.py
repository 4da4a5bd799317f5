"""Counted compute and size of the other systems, each traced once on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from everest_ds.models.peers import PEERS, Peer, blank_inputs
from everest_ds.profiling.counter import ComputeCount, count_forward


@dataclass(frozen=True)
class PeerCount:
    """One view's forward pass, how many views the published figure sums, and the trainable parameters."""

    forward: ComputeCount
    views: int
    num_parameters: int


def peer_names() -> list[str]:
    """Names of the systems that can be built."""
    return list(PEERS)


def find_peer(name: str) -> Peer:
    """A system by one of `peer_names()`."""
    return PEERS[name]


@cache
def count_peer(name: str) -> PeerCount:
    """Build a system of models/peers/ at its published size, without weights, and count it."""
    peer = PEERS[name]
    with torch.device("meta"):
        model = peer.build()
        inputs = blank_inputs(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return PeerCount(count_forward(model, *inputs), peer.views, trainable)
