"""Advice for a model that fits nowhere: the nearest number of ranks and the smallest device that suffice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from everest_ds.config.schema import Experiment
from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.hardware.machine import Machine
from everest_ds.errors import UsageError
from everest_ds.tuning.search import Cluster, Options, search
from everest_ds.tuning.space import Dropped
from everest_ds.units import format_bytes

MOST_RANKS = 1024


def fits_nowhere(
    config: Experiment, cluster: Cluster, options: Options, dropped: list[Dropped]
) -> UsageError:
    """Return the error of a search without candidates, with the changes that would make the model fit."""
    short = [one for one in dropped if one.shortage_bytes is not None]
    best = min(short, key=lambda one: one.shortage_bytes or 0)
    machine = cluster.machine
    ways = [*_more_ranks(config, cluster, options), *_larger_devices(config, cluster, options)]
    if config.model.attention == "unfused":
        ways.append("model.attention=fused")
    return UsageError(
        f"fits nowhere on {cluster.num_ranks} x {machine.device}",
        given=f"{format_bytes(machine.memory_bytes)} usable; {best.family}: {best.reason}",
        fix=", ".join(ways) or "a smaller model.backbone, model.num_frames or tokens.keep_ratio",
    )


def _more_ranks(config: Experiment, cluster: Cluster, options: Options) -> Iterator[str]:
    """Yield the option with the fewest ranks, by doubling, on which the model fits."""
    machine, ranks = cluster.machine, 2 * cluster.num_ranks
    while machine.asynchronous and ranks <= MOST_RANKS:
        more = replace(machine, ranks_per_node=max(machine.ranks_per_node, min(8, ranks)))
        if _fits(config, more, ranks, options):
            yield f"--gpus {ranks}"
            return
        ranks *= 2


def _larger_devices(config: Experiment, cluster: Cluster, options: Options) -> Iterator[str]:
    """Yield the option with the device of least memory on which the model fits."""
    machine = cluster.machine
    larger = [(d.memory_gib, name) for name, d in DEVICES.items() if d.memory_bytes > machine.memory_bytes]
    for _, name in sorted(larger):
        other = machine_from_sheet(name, DEVICES[name], ranks_per_node=machine.ranks_per_node)
        if other.memory_bytes > machine.memory_bytes and _fits(config, other, cluster.num_ranks, options):
            yield f"--gpu '{name}'"
            return


def _fits(config: Experiment, machine: Machine, num_ranks: int, options: Options) -> bool:
    try:
        return bool(search(config, Cluster(machine, num_ranks), options).ranked)
    except UsageError:
        return False
