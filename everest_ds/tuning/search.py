"""The search: every sharding, recompute mode and micro-batch that runs and fits, ranked by predicted time.

Candidates that cannot be fastest are skipped: a micro-batch that fits without recompute or offload would only
take longer with them, so recompute and offload are tried with other micro-batches only (`_done_faster`).
Shardings share the memory and the work of a rank's forward and backward passes, so both are predicted once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from everest_ds.config.load import flatten
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.schema import Experiment, RecomputeConfig
from everest_ds.config.zero_settings import ZeroSettings, zero_settings
from everest_ds.costs.hardware.machine import Machine
from everest_ds.costs.memory import MemoryPrediction, PassMemory, peak_of, predict_passes
from everest_ds.costs.state_memory import state_memory
from everest_ds.costs.step_time import StepPrediction, StepWork, assemble_step, predict_work
from everest_ds.errors import ConfigError, UsageError
from everest_ds.tuning.batches import (
    keep_global_batch,
    nothing_runs,
    with_micro_batch,
)
from everest_ds.tuning.space import Dropped, Sharding, Space, by_reason
from everest_ds.units import format_bytes

BUCKETS = (5_000_000, 50_000_000, 200_000_000)  # values, tried beside the sizes of the DeepSpeed file
_WORTH_A_FILE = 0.99  # other buckets need a DeepSpeed file of their own: too much for less than 1 %


@dataclass(frozen=True)
class Cluster:
    """A cluster of `num_ranks` ranks, each a `machine`."""

    machine: Machine
    num_ranks: int

    @property
    def ranks_per_node(self) -> int:
        """The number of ranks on each node."""
        return min(self.machine.ranks_per_node, self.num_ranks)

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return -(-self.num_ranks // self.ranks_per_node)


@dataclass(frozen=True)
class Options:
    """The options of a search.

    Attributes:
        global_batch: clips per step; None: the config's own.
        any_precision: try every precision of the device instead of the config's only.
        pinned: keys of the config that keep their values.
        exhaustive: also evaluate candidates that cannot be fastest.
    """

    global_batch: int | None = None
    any_precision: bool = False
    pinned: Collection[str] = ()
    exhaustive: bool = False


@dataclass(frozen=True)
class Candidate:
    """A complete config that fits in memory, with its predictions.

    Attributes:
        sharding: the family of the candidate.
        config: the complete config.
        zero: settings of its DeepSpeed file.
        own_buckets: the bucket sizes differ from those of a shipped DeepSpeed file.
        memory: predicted memory of a rank.
        step: predicted time of a step.
        base: the config as the user gave it.
    """

    sharding: Sharding
    config: Experiment
    zero: ZeroSettings
    own_buckets: bool
    memory: MemoryPrediction
    step: StepPrediction
    base: Experiment = field(repr=False)

    @property
    def overrides(self) -> tuple[str, ...]:
        """Return `key=value` for each key that differs from the given config; bucket sizes are left out."""
        given = dict(flatten(self.base.model_dump(mode="json")))
        own = flatten(self.config.model_dump(mode="json"))
        return tuple(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in own
            if given[key] != value
        )

    @property
    def order(self) -> tuple[float, float]:
        """Return the sort key: fastest step first; among equals, the shortest step without data first."""
        seconds = self.step.step_s
        without_data = seconds - self.step.split()["data"]
        return float(f"{seconds:.4g}"), float(
            f"{without_data:.6g}"
        )  # rounded: sums in another order count as ties


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        ranked: the best candidate of each sharding and recompute mode, fastest first.
        dropped: families without a candidate, and why.
        evaluations: number of predictions of memory, and of time.
    """

    ranked: list[Candidate]
    dropped: list[Dropped]
    evaluations: tuple[int, int]


def search(config: Experiment, cluster: Cluster, options: Options | None = None) -> SearchResult:
    """Search the candidates for `config` on a cluster; the result has none if the model fits nowhere.

    Raises:
        UsageError: the global batch cannot be split over the ranks, or nothing can run with the pinned keys.
    """
    return _Search(config, cluster, options or Options()).run()


def describe_recompute(recompute: RecomputeConfig) -> str:
    """Return the recompute settings in human-readable form, such as `blocks/2 + offload`."""
    every = f"/{recompute.every}" if recompute.mode == "blocks" else ""
    kept = [
        name for name, on in (("offload", recompute.offload_to_cpu), ("partition", recompute.partition)) if on
    ]
    return " + ".join((f"{recompute.mode}{every}", *kept))


def needed_bytes(memory: MemoryPrediction, machine: Machine) -> int:
    """Return the bytes that a rank needs; on a CPU they include the host's, which is the same memory."""
    if machine.asynchronous:
        return memory.peak_bytes
    return machine.baseline_bytes + memory.peak_bytes + memory.host_bytes


_Key = tuple[str, int, RecomputeConfig, int]


class _Variant(NamedTuple):
    """A sharding with a recompute setting."""

    sharding: Sharding
    recompute: RecomputeConfig


class _Search:
    def __init__(self, config: Experiment, cluster: Cluster, options: Options) -> None:
        self.base, self.options = config, options
        self.cluster, self.machine, self.num_ranks = cluster, cluster.machine, cluster.num_ranks
        self.config = keep_global_batch(config, cluster.num_ranks, options.global_batch)
        self.dropped: list[Dropped] = []
        self.refused: list[tuple[Sharding, str, int | None]] = []  # with the reason; the shortage is None
        self.fitting: dict[_Variant, frozenset[int]] = {}
        self.shortages: dict[
            _Variant, tuple[int, int]
        ] = {}  # the least shortage in bytes, and its micro-batch
        self.passes: dict[_Key, PassMemory] = {}
        self.work: dict[_Key, StepWork] = {}
        self.num_memories = self.num_times = 0

    def run(self) -> SearchResult:
        space = Space(
            config=self.config,
            num_ranks=self.num_ranks,
            ranks_per_node=self.cluster.ranks_per_node,
            precisions=self._precisions(),
            pinned=self.options.pinned,
            offloads=self.machine.asynchronous,
        )
        found = [way for sharding in space.shardings() for way in self._of_sharding(space, sharding)]
        if not found and not self.fitting:
            reasons = dict.fromkeys(reason for _, reason, _ in self.refused)
            raise nothing_runs(self.config, self.num_ranks, space.ranks_per_node, list(reasons))
        ranked = sorted(found, key=lambda candidate: candidate.order)
        return SearchResult(ranked, self._all_dropped(found), (self.num_memories, self.num_times))

    def _precisions(self) -> Sequence[str]:
        if self.config.parallelism.offload_to_nvme is not None:
            reason = "NVMe offload is not in the cost model; other shardings are tried"
            self.dropped.append(Dropped("parallelism.offload_to_nvme", reason))
        own, possible = self.config.precision, self.machine.precisions
        if own not in possible and "precision" in self.options.pinned:
            said = f"precision: {self.machine.device} has no fast {own}"
            raise UsageError(said, given=own, allowed=", ".join(possible))
        if own not in possible:
            reason = f"{self.machine.device} has no fast {own}; the others are tried, which round differently"
            self.dropped.append(Dropped(own, reason))
            return possible
        return possible if self.options.any_precision else (own,)

    def _of_sharding(self, space: Space, sharding: Sharding) -> Iterator[Candidate]:
        """Yield the best candidate of each recompute setting."""
        try:
            sharded = space.sharded(sharding)
        except ConfigError as error:
            self.refused.append((sharding, str(error), None))
            return
        zero, micro_batches = zero_settings(sharded), space.micro_batches(sharded)
        for recompute in space.recomputes(sharded):
            way = _Variant(sharding, recompute)
            config = sharded.model_copy(update={"recompute": recompute})
            done_faster = self._done_faster(way)
            configs = [with_micro_batch(config, clips) for clips in micro_batches if clips not in done_faster]
            needed = [(one, self._memory(one, zero)) for one in configs]
            fitting = [(one, memory) for one, memory in needed if self._over(memory) <= 0]
            self.fitting[way] = done_faster.union(one.batch.micro_batch_size for one, _ in fitting)
            if not self.fitting[way]:
                shortages = ((self._over(memory), one.batch.micro_batch_size) for one, memory in needed)
                self.shortages[way] = min(shortages)
            tried = [self._candidate(sharding, one, memory, zero) for one, memory in fitting]
            if tried:
                yield self._with_best_buckets(min(tried, key=lambda candidate: candidate.order))

    def _over(self, memory: MemoryPrediction) -> int:
        return needed_bytes(memory, self.machine) - self.machine.memory_bytes

    def _done_faster(self, way: _Variant) -> frozenset[int]:
        """Return the micro-batches that already fit in a way that needs less time for the same step."""
        if self.options.exhaustive:
            return frozenset()
        return frozenset().union(*(self.fitting.get(other, ()) for other in self._faster(way)))

    def _faster(self, way: _Variant) -> Iterator[_Variant]:
        """Yield the ways that need less time with the same micro-batch."""
        sharding, recompute = way
        if sharding.offload:
            yield _Variant(sharding._replace(offload=False), recompute)
        for key in ("offload_to_cpu", "partition"):
            if getattr(recompute, key):
                yield _Variant(sharding, recompute.model_copy(update={key: False}))
        less = {"none": (), "gelu": ("none",)}.get(recompute.mode, ("none", "gelu"))
        for mode in less:
            yield _Variant(sharding, RecomputeConfig(mode=mode, every=self.config.recompute.every))

    def _memory(self, config: Experiment, zero: ZeroSettings) -> MemoryPrediction:
        key, degree = _key(config), MeshShape.of(config, self.num_ranks).degrees.data
        if key not in self.passes:
            self.passes[key] = predict_passes(config)
        passes = self.passes[key]
        self.num_memories += 1
        return peak_of(passes, state_memory(config, passes.num_parameters, degree, zero))

    def _candidate(
        self,
        sharding: Sharding,
        config: Experiment,
        memory: MemoryPrediction,
        zero: ZeroSettings,
        own_buckets: bool = False,
    ) -> Candidate:
        self.num_times += 1
        key = _key(config)
        if key not in self.work:
            self.work[key] = predict_work(config, self.machine)
        step = assemble_step(self.work[key], config, self.num_ranks, self.machine, zero)
        return Candidate(sharding, config, zero, own_buckets, memory, step, self.base)

    def _with_best_buckets(self, candidate: Candidate) -> Candidate:
        """Return the candidate with faster bucket sizes if they are worth a DeepSpeed file of their own."""
        sharding, config = candidate.sharding, candidate.config
        if sharding.stage == 0 or sharding.offload or config.parallelism.ds_config is not None:
            return candidate
        wider = [candidate.zero.with_buckets(size) for size in BUCKETS]
        fitting = [(zero, memory) for zero in wider if self._over(memory := self._memory(config, zero)) <= 0]
        others = [self._candidate(sharding, config, memory, zero, True) for zero, memory in fitting]
        best = min(others, key=lambda other: other.order, default=candidate)
        return best if best.step.step_s < _WORTH_A_FILE * candidate.step.step_s else candidate

    def _all_dropped(self, found: Sequence[Candidate]) -> list[Dropped]:
        used = {way for one in found for way in (one.sharding, one.config.recompute)}
        modes: dict[str, list[str]] = {}
        for recompute, reason, _ in self._unused(used, lambda way: way.recompute):
            modes.setdefault(reason, []).append(describe_recompute(recompute))
        shardings = [*self.refused, *self._unused(used, lambda way: way.sharding)]
        return [
            *self.dropped,
            *by_reason(shardings),
            *(Dropped(f"recompute {', '.join(names)}", reason) for reason, names in modes.items()),
        ]

    def _unused(
        self, used: Collection[Any], part: Callable[[_Variant], Any]
    ) -> Iterator[tuple[Any, str, int | None]]:
        """Yield each sharding (or recompute setting) without a candidate, the reason, and the bytes short."""
        for unused in dict.fromkeys(part(way) for way in self.fitting if part(way) not in used):
            ways = [way for way in self.fitting if part(way) == unused]
            if any(self.fitting[way] for way in ways):
                # A micro-batch that also fits without this setting is skipped, because it is faster without.
                yield unused, "gains nothing: every micro-batch that fits with it also fits without it", None
                continue
            way = min(ways, key=lambda way: self.shortages[way])
            shortage, clips = self.shortages[way]
            where = f"micro-batch {clips}, recompute {describe_recompute(way.recompute)}"
            yield unused, f"out of memory by {format_bytes(shortage)} at best ({where})", shortage


def _key(config: Experiment) -> _Key:
    """Return the cache key: everything that a rank's forward and backward passes depend on."""
    return config.precision, config.parallelism.tensor, config.recompute, config.batch.micro_batch_size
