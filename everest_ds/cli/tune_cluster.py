"""The cluster that `everest-ds tune` was told of."""

from __future__ import annotations

from pathlib import Path

from everest_ds.errors import UsageError
from everest_ds.profiling.device_file import device_of
from everest_ds.tuning.search import Cluster
from everest_ds.tuning.sheet import RANKS_PER_NODE, machine_from_sheet


def cluster_of(gpu: str, num_gpus: int, nodes: int | None, interconnect: str | None) -> Cluster:
    """`num_gpus` of one kind, evenly on `nodes`, or on as few as hold 8 each.

    Raises:
        UsageError: the device or interconnect is not known, or the nodes do not divide the GPUs.
    """
    name, device = device_of(gpu)
    a_node = _ranks_per_node(num_gpus, nodes)
    return Cluster(machine_from_sheet(name, device, interconnect, a_node), num_gpus)


def cluster_here(num_ranks: int, calibration: Path | None = None) -> Cluster:
    """So many ranks of this machine, as it was calibrated.

    Raises:
        UsageError: it was not.
    """
    from everest_ds.cli.calibrate import machine_here

    return Cluster(machine_here(num_ranks, calibration), num_ranks)


def _ranks_per_node(num_gpus: int, nodes: int | None) -> int:
    if nodes is None:
        return next(each for each in range(RANKS_PER_NODE, 0, -1) if num_gpus % each == 0)
    if num_gpus % nodes:
        divisors = [str(n) for n in range(1, num_gpus + 1) if num_gpus % n == 0]
        given = f"--gpus {num_gpus} --nodes {nodes}"
        raise UsageError("every node has as many GPUs", given=given, allowed=", ".join(divisors))
    return num_gpus // nodes
