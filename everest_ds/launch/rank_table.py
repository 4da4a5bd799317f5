"""The host of every rank, predicted before a job starts from SLURM's block distribution over a node list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from everest_ds.errors import UsageError
from everest_ds.launch.slurm_nodelist import expand_nodelist


class RankPlace(NamedTuple):
    """The host of one rank, and the rank's number on that host."""

    rank: int
    host: str
    local_rank: int


def place_ranks(hosts: Sequence[str], ranks_per_node: int) -> list[RankPlace]:
    """Assign consecutive ranks to each host, beginning with rank 0 on the first host.

    The ranks of a host are consecutive, so that tensor-parallel groups stay within one host.
    """
    return [
        RankPlace(node * ranks_per_node + local_rank, host, local_rank)
        for node, host in enumerate(hosts)
        for local_rank in range(ranks_per_node)
    ]


def hosts_of(nodelist: str, num_nodes: int) -> list[str]:
    """Return the hosts that `--nodelist` names.

    Raises:
        UsageError: if the notation is malformed, or the list does not name `num_nodes` different hosts.
    """
    hosts = expand_nodelist(nodelist)
    if len(hosts) != len(set(hosts)) or len(hosts) != num_nodes:
        raise UsageError(
            "--nodelist and --nodes disagree",
            given=f"{len(hosts)} hosts named, {len(set(hosts))} of them different, with --nodes {num_nodes}",
            fix="name as many hosts as --nodes asks for, each once",
        )
    return hosts
