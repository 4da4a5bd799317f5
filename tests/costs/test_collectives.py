"""Tests of the times of collectives, against messages that are counted one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from everest_ds.config.mesh_shape import RankGroup
from everest_ds.costs.collectives import NOTHING, collective
from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.hardware.machine import Link, Machine, same_link

LATENCY, RATE, MIB = 1e-5, 1e9, 2**20


def machine(between: Link = Link(1e-4, 1e8), latency: float = LATENCY) -> Machine:
    sheet = machine_from_sheet("H100", DEVICES["H100 SXM"], ranks_per_node=4)
    return replace(sheet, inside=same_link(Link(latency, RATE)), between=between)


def ring_seconds(num_bytes: float, ranks: int, rounds: int) -> float:
    """Return the time of a ring: in every round, each rank passes one part on to its neighbour."""
    return sum(LATENCY + num_bytes / ranks / RATE for _ in range(rounds))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_ring_passes_parts_around(ranks: int) -> None:
    size = 64 * MIB
    for name, turns in (("all_reduce", 2), ("reduce_scatter", 1), ("all_gather", 1)):
        found = collective(name, size, RankGroup(ranks), machine())
        assert found.seconds == pytest.approx(ring_seconds(size, ranks, turns * (ranks - 1)))
        assert found.sent_bytes == pytest.approx(turns * (ranks - 1) * size / ranks)
        assert found.algorithm == "ring"


def test_few_bytes_on_many_ranks_go_by_a_tree() -> None:
    found = collective("all_reduce", 1024, RankGroup(4), machine(latency=1e-3))
    assert found.algorithm == "tree"
    assert found.seconds == pytest.approx(2 * 2 * 1e-3 + 2 * 1024 / RATE)


def test_a_rank_alone_sends_nothing() -> None:
    assert collective("all_reduce", MIB, RankGroup(1), machine()) == NOTHING


def test_two_nodes_reduce_inside_first() -> None:
    """Each of the 4 ranks of a node sends a quarter over a quarter of the link between nodes."""
    size, slow = 64 * MIB, Link(1e-4, 1e9)
    found = collective("all_reduce", size, RankGroup(8, nodes=2), machine(between=slow))
    inside = 2 * ring_seconds(size, 4, 3)
    outside = 2 * (slow.latency_s + (size / 4 / 2) / (slow.bytes_per_s / 4))
    flat = 14 * slow.latency_s + 14 / 8 * size / slow.bytes_per_s
    assert found.seconds == pytest.approx(min(inside + outside, flat))


def test_groups_of_one_node_share_its_way_out() -> None:
    alone = collective("all_gather", 64 * MIB, RankGroup(2, nodes=2), machine())
    shared = collective("all_gather", 64 * MIB, RankGroup(2, nodes=2, sharing=4), machine())
    assert shared.seconds - LATENCY > 3.9 * (alone.seconds - 1e-4)
