"""The cluster that the options of `everest-ds tune` describe."""

from __future__ import annotations

from pathlib import Path

from everest_ds.costs.hardware.data_sheet import RANKS_PER_NODE, machine_from_sheet
from everest_ds.costs.hardware.gpus import device_of
from everest_ds.errors import UsageError
from everest_ds.tuning.search import Cluster


def cluster_of(gpu: str, num_gpus: int, nodes: int | None, interconnect: str | None) -> Cluster:
    """Build a cluster of `num_gpus` equal GPUs, spread evenly over `nodes` nodes.

    By default the cluster has as few nodes as possible, with at most 8 GPUs each.

    Raises:
        UsageError: the device or interconnect is unknown, or the GPUs cannot be spread evenly.
    """
    name, device = device_of(gpu)
    a_node = _ranks_per_node(num_gpus, nodes)
    return Cluster(machine_from_sheet(name, device, interconnect, a_node), num_gpus)


def cluster_here(num_ranks: int, calibration: Path | None = None) -> Cluster:
    """Build a cluster of `num_ranks` ranks on this machine, from its calibration.

    Raises:
        UsageError: this machine has not been calibrated for that number of ranks.
    """
    from everest_ds.tuning.calibration.local_machine import machine_here

    return Cluster(machine_here(num_ranks, calibration), num_ranks)


def _ranks_per_node(num_gpus: int, nodes: int | None) -> int:
    if nodes is None:
        return next(each for each in range(RANKS_PER_NODE, 0, -1) if num_gpus % each == 0)
    if num_gpus % nodes:
        divisors = [str(n) for n in range(1, num_gpus + 1) if num_gpus % n == 0]
        raise UsageError(
            f"--gpus {num_gpus} is not a multiple of --nodes {nodes}",
            allowed=f"--nodes {', '.join(divisors)}",
            fix="change --nodes or --gpus",
        )
    return num_gpus // nodes
