"""Which rank runs where, before any node is there: SLURM's block distribution over a node list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from everest_ds.errors import UsageError
from everest_ds.launch.nodelist import expand_nodelist


class RankPlace(NamedTuple):
    """One rank's seat."""

    rank: int
    host: str
    local_rank: int


def place_ranks(hosts: Sequence[str], ranks_per_node: int) -> list[RankPlace]:
    """Rank 0 on the first host; a host's ranks are neighbours, so that tensor groups stay on it."""
    return [
        RankPlace(node * ranks_per_node + local_rank, host, local_rank)
        for node, host in enumerate(hosts)
        for local_rank in range(ranks_per_node)
    ]


def hosts_of(nodelist: str, num_nodes: int) -> list[str]:
    """The hosts that `--nodelist` names.

    Raises:
        UsageError: the notation is malformed, or a list that `--nodes` cannot be taken from.
    """
    hosts = expand_nodelist(nodelist)
    if len(hosts) != len(set(hosts)) or len(hosts) != num_nodes:
        raise UsageError(
            "--nodelist and --nodes disagree",
            given=f"{len(set(hosts))} different hosts of {len(hosts)} named, --nodes {num_nodes}",
            fix="name as many hosts as --nodes asks for, each once",
        )
    return hosts
