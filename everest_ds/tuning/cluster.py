"""The cluster that a config is tuned for: built from the data sheet of a GPU, or from a calibration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from everest_ds.config import Experiment
from everest_ds.costs.hardware.data_sheet import RANKS_PER_NODE, machine_from_sheet
from everest_ds.costs.hardware.gpus import device_of
from everest_ds.costs.hardware.machine import Machine
from everest_ds.costs.memory import MemoryPrediction
from everest_ds.errors import UsageError
from everest_ds.profiling.loading_record import knowing_data


@dataclass(frozen=True)
class Cluster:
    """A cluster of `num_ranks` equal ranks, each described by `machine`."""

    machine: Machine
    num_ranks: int

    @property
    def ranks_per_node(self) -> int:
        """The number of ranks on a node, within which a tensor-parallel group must lie."""
        return min(self.machine.ranks_per_node, self.num_ranks)

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return -(-self.num_ranks // self.ranks_per_node)

    def needed_bytes(self, memory: MemoryPrediction) -> int:
        """Return the bytes that a rank needs; on a CPU they include host memory, which is the same memory."""
        if self.machine.asynchronous:
            return memory.peak_bytes
        return self.machine.baseline_bytes + memory.peak_bytes + memory.host_bytes

    def loading_data_of(self, config: Experiment) -> Cluster:
        """Return the cluster with what is known of loading the config's data."""
        return replace(self, machine=knowing_data(self.machine, config))

    def free_pct(self, needed_bytes: float) -> float:
        """Return the share of a rank's usable memory, in percent, that `needed_bytes` leave free."""
        return 100 * (1 - needed_bytes / self.machine.memory_bytes)


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
