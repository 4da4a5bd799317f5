"""The reasons why a candidate is slower than the best, and the changes that make a model fit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from everest_ds.config.schema import Experiment
from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.hardware.machine import Machine
from everest_ds.costs.term import TermGroup
from everest_ds.errors import UsageError
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.cluster import Cluster
from everest_ds.tuning.knobs import KNOBS
from everest_ds.tuning.search import Options, search
from everest_ds.tuning.space import Dropped, by_reason
from everest_ds.units import format_bytes

MOST_RANKS = 1024

_BOUND: dict[TermGroup, str] = {
    "compute": "its matrix products are smaller and reach a lower rate",
    "recompute": "recomputes activations",
    "optimizer": "updates more weights on each rank",
    "communication": "communication-bound",
    "offload": "bound by copies to and from the host",
    "data": "each rank decodes more clips",
    "overhead": "bound by operator launches and DeepSpeed's hooks",
}
EQUALLY_FAST = 1.005  # a candidate that takes less than this times the best step counts as equally fast


def why_slower(candidate: Candidate, best: Candidate) -> str:
    """Return one line: how much slower the candidate is than the best, and the main cause."""
    own, theirs = candidate.step.split(), best.step.split()
    group = max(own, key=lambda name: own[name] - theirs[name])
    times = candidate.step.step_s / best.step.step_s
    much = f"{times:.2f} x the best step" if times >= EQUALLY_FAST else "about as fast as the best"
    differing = [knob for knob in KNOBS if knob.of(candidate.config) != knob.of(best.config)]
    reasons = [k.reason.format(k.of(candidate.config)) for k in differing if k.reason and group in k.terms]
    return f"{much}: {next(iter(reasons), _BOUND[group])}"


def slower_families(ranked: Sequence[Candidate], shown: int) -> Iterator[Dropped]:
    """Return shardings without a candidate among the first `shown`, and why the best of each is slower."""
    seen = {candidate.sharding for candidate in ranked[:shown]}
    first = {one.sharding: one for one in reversed(ranked[shown:]) if one.sharding not in seen}
    ordered = sorted(first.values(), key=lambda candidate: candidate.order)
    return by_reason((one.sharding, why_slower(one, ranked[0]), None) for one in ordered)


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
        f"the model does not fit on {cluster.num_ranks} x {machine.device}",
        given=f"{format_bytes(machine.memory_bytes)} usable; {best.family}: {best.reason}",
        fix=", ".join(ways) or "a smaller model.backbone, model.num_frames or tokens.keep_ratio",
    )


def _more_ranks(config: Experiment, cluster: Cluster, options: Options) -> Iterator[str]:
    """Yield `--gpus N` for the first doubling of the ranks on which the model fits, if there is one."""
    machine, ranks = cluster.machine, 2 * cluster.num_ranks
    while machine.asynchronous and ranks <= MOST_RANKS:
        more = replace(machine, ranks_per_node=max(machine.ranks_per_node, min(8, ranks)))
        if _fits(config, more, ranks, options):
            yield f"--gpus {ranks}"
            return
        ranks *= 2


def _larger_devices(config: Experiment, cluster: Cluster, options: Options) -> Iterator[str]:
    """Yield `--gpu NAME` for the device with the least memory on which the model fits, if there is one."""
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
