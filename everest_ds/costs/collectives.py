"""Time and traffic of collectives, each by the algorithm that is fastest on the links of its group.

Symbols: S bytes of the whole tensor, n ranks of a group on m nodes with g ranks each, α latency and β bytes
per second of a link. A rank sends to one neighbour at a time:

    ring all-reduce           2(n-1) messages of S/n       2(n-1)(α + S/nβ)
    ring reduce-scatter       n-1 messages of S/n          (n-1)(α + S/nβ)       all-gather likewise
    tree all-reduce           up and down, pipelined       2⌈log₂n⌉α + 2S/β
    hierarchical all-reduce   reduce-scatter in a node, all-reduce of S/g between nodes, all-gather in a node

Groups that communicate at the same time share the link between nodes, as do the ranks of one node.
"""

from __future__ import annotations

from math import ceil, log2
from typing import NamedTuple

from everest_ds.config.mesh_shape import RankGroup
from everest_ds.costs.hardware.machine import Link, Machine


class Collective(NamedTuple):
    """The predicted cost of one collective.

    Attributes:
        seconds: from the start of the first rank to the end of the last.
        sent_bytes: sent by each rank.
        algorithm: human-readable name.
    """

    seconds: float
    sent_bytes: float
    algorithm: str


NOTHING = Collective(0.0, 0.0, "none")


def collective(name: str, num_bytes: float, group: RankGroup, machine: Machine) -> Collective:
    """Predict the cost of the collective `name` (one of COLLECTIVES) on a whole tensor of `num_bytes`."""
    if group.ranks == 1:
        return NOTHING
    inside = machine.inside[name]
    if group.nodes == 1:
        return _flat(name, num_bytes, group.ranks, inside)
    link = Link(machine.between.latency_s, machine.between.bytes_per_s / group.sharing)
    slowest = Link(max(link.latency_s, inside.latency_s), min(link.bytes_per_s, inside.bytes_per_s))
    over_all = _flat(name, num_bytes, group.ranks, slowest)
    return min(over_all, _hierarchical(name, num_bytes, group, inside, link), key=lambda way: way.seconds)


def _flat(name: str, num_bytes: float, n: int, link: Link) -> Collective:
    """Predict a collective among `n` ranks whose links are all equal."""
    passes = 2 if name == "all_reduce" else 1
    sent = passes * num_bytes * (n - 1) / n
    ring = Collective(link.seconds(sent, passes * (n - 1)), sent, "ring")
    if name != "all_reduce":
        return ring
    tree = Collective(link.seconds(2 * num_bytes, 2 * ceil(log2(n))), 2 * num_bytes, "tree")
    return min(ring, tree, key=lambda way: way.seconds)


def _hierarchical(name: str, num_bytes: float, group: RankGroup, inside: Link, between: Link) -> Collective:
    """Predict a two-level collective: each of the g ranks of a node carries its part between nodes."""
    g = group.inside
    own_lane = Link(between.latency_s, between.bytes_per_s / g)
    ways = [_flat(name, num_bytes / g, group.nodes, own_lane)]
    if g > 1:
        halves = ("reduce_scatter", "all_gather") if name == "all_reduce" else (name,)
        ways += [_flat(half, num_bytes, g, inside) for half in halves]
    seconds, sent_bytes = sum(way.seconds for way in ways), sum(way.sent_bytes for way in ways)
    return Collective(seconds, sent_bytes, "hierarchical")
