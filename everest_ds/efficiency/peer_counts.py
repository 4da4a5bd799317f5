"""Counted compute and size of the peer systems, each traced once on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from everest_ds.efficiency.peers import PEERS, Peer, blank_inputs
from everest_ds.profiling.mac_counter import ComputeCount, count_forward


@dataclass(frozen=True)
class PeerCount:
    """The counted size and compute of a peer system.

    Attributes:
        forward: forward pass of one view.
        views: number of views that the published figure sums over.
        num_parameters: number of trainable parameters.
    """

    forward: ComputeCount
    views: int
    num_parameters: int


def peer_names() -> list[str]:
    """Return the names of the peer systems that can be built."""
    return list(PEERS)


def find_peer(name: str) -> Peer:
    """Return the peer system with this name, one of `peer_names()`."""
    return PEERS[name]


@cache
def count_peer(name: str) -> PeerCount:
    """Build a system of peers/ at its published size, without weights, and count its compute."""
    peer = PEERS[name]
    with torch.device("meta"):
        model = peer.build()
        inputs = blank_inputs(model)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return PeerCount(count_forward(model, *inputs), peer.views, trainable)
