"""The search: every sharding, recompute mode and micro-batch that runs and fits, ranked by predicted time.

Candidates that cannot be fastest are skipped: details that fit without recompute or offload would only take
longer with them, so recompute and offload are tried with other details only (`_fits_faster`). Shardings share
the memory and the work of a rank's forward and backward passes, so both are predicted once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import ZeroSettings, zero_settings
from everest_ds.costs.memory import MemoryPrediction, PassMemory, peak_of, predict_passes
from everest_ds.costs.state_memory import state_memory
from everest_ds.costs.step_time import StepWork, assemble_step, predict_work
from everest_ds.errors import ConfigError, UsageError
from everest_ds.tuning.batches import keep_global_batch, nothing_runs
from everest_ds.tuning.candidate import Candidate, detail_names
from everest_ds.tuning.cluster import Cluster
from everest_ds.tuning.knobs import (
    DETAIL,
    FAMILY,
    KNOBS,
    PRECISION,
    VARIANT,
    Settings,
    bucket_sizes,
    columns_of,
    pass_settings,
    settings_of,
    with_settings,
)
from everest_ds.tuning.space import Dropped, Sharding, Space, by_reason
from everest_ds.units import format_bytes

# Other bucket sizes need a DeepSpeed file of their own, which a gain of less than 1 % does not justify.
_WORTH_A_FILE = 0.99


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


@dataclass(frozen=True)
class _VariantResult:
    """The search result for one variant of a sharding.

    Attributes:
        config: the config of the variant.
        fitting: settings of the details that fit with this variant or with a faster one.
        shortage_bytes: least shortage of memory, if none fits.
        shortest: the config with that shortage.
    """

    config: Experiment
    fitting: frozenset[Settings]
    shortage_bytes: int = 0
    shortest: Experiment | None = None

    @property
    def sharding(self) -> Sharding:
        return Sharding.of(self.config)

    @property
    def variant(self) -> Settings:
        return settings_of(self.config, VARIANT)


class _Search:
    def __init__(self, config: Experiment, cluster: Cluster, options: Options) -> None:
        self.base, self.cluster, self.options = config, cluster, options
        self.config = keep_global_batch(config, cluster.num_ranks, options.global_batch)
        self.dropped: list[Dropped] = []
        self.refused: list[tuple[Sharding, str, int | None]] = []  # sharding, reason, None
        self.results: dict[Settings, _VariantResult] = {}  # by the settings of family and variant
        self.passes: dict[Settings, PassMemory] = {}
        self.work: dict[Settings, StepWork] = {}
        self.num_memories = self.num_times = 0

    def run(self) -> SearchResult:
        cluster, space = self.cluster, Space(self.config, self.cluster, self._free())
        found = [one for sharded in space.shardings() for one in self._of_sharding(space, sharded)]
        if not self.results:
            reasons = dict.fromkeys(reason for _, reason, _ in self.refused)
            raise nothing_runs(self.config, cluster.num_ranks, cluster.ranks_per_node, list(reasons))
        ranked = sorted(found, key=lambda candidate: candidate.order)
        return SearchResult(ranked, self._all_dropped(found), (self.num_memories, self.num_times))

    def _free(self) -> set[str]:
        """Return the keys to search, and note which of the config's values are replaced, and why."""
        pinned, device = self.options.pinned, self.cluster.machine.device
        free = {
            knob.key
            for knob in KNOBS
            if (knob.key not in pinned if knob.searched else self.options.any_precision)
        }
        if self.config.parallelism.offload_to_nvme is not None:
            reason = "NVMe offload is not in the cost model; other shardings are tried"
            self.dropped.append(Dropped("parallelism.offload_to_nvme", reason))
        own, possible = PRECISION.of(self.config), PRECISION.values(self.config, self.cluster)
        if own in possible:
            return free
        if PRECISION.key in pinned:
            fault = f"{PRECISION.key}: {device} has no fast {own}"
            raise UsageError(fault, given=own, allowed=", ".join(possible))
        reason = f"{device} has no fast {own}; the other precisions are tried, which round differently"
        self.dropped.append(Dropped(own, reason))
        return free | {PRECISION.key}

    def _of_sharding(self, space: Space, sharded: Experiment) -> Iterator[Candidate]:
        """Yield the best candidate of each variant of a sharding."""
        try:
            space.check_sharded(sharded)
        except ConfigError as error:
            self.refused.append((Sharding.of(sharded), str(error), None))
            return
        zero, details = zero_settings(sharded), space.details(sharded)
        for variant in space.variants(sharded):
            done = self._fits_faster(variant)
            configs = [with_settings(variant, DETAIL, one) for one in details if one not in done]
            needed = [(one, self._memory(one, zero)) for one in configs]
            fitting = [(one, memory) for one, memory in needed if self._shortage(memory) <= 0]
            fits = done.union(settings_of(one, DETAIL) for one, _ in fitting)
            result = _VariantResult(variant, fits)
            if not fits:
                shortest, memory = min(needed, key=lambda pair: self._shortage(pair[1]))
                result = _VariantResult(variant, fits, self._shortage(memory), shortest)
            self.results[settings_of(variant, (*FAMILY, *VARIANT))] = result
            tried = [self._candidate(one, memory, zero) for one, memory in fitting]
            if tried:
                yield self._with_best_buckets(min(tried, key=lambda candidate: candidate.order))

    def _shortage(self, memory: MemoryPrediction) -> int:
        return self.cluster.needed_bytes(memory) - self.cluster.machine.memory_bytes

    def _fits_faster(self, variant: Experiment) -> frozenset[Settings]:
        """Return the details that already fit with settings that need less time for the same step."""
        if self.options.exhaustive:
            return frozenset()
        knobs = (*FAMILY, *VARIANT)
        faster = (
            settings_of(knob.chosen(variant, value), knobs)
            for knob in knobs
            for value in knob.faster.get(knob.of(variant), ())
        )
        return frozenset().union(
            *(self.results[result].fitting for result in faster if result in self.results)
        )

    def _memory(self, config: Experiment, zero: ZeroSettings) -> MemoryPrediction:
        key, degree = pass_settings(config), MeshShape.of(config, self.cluster.num_ranks).degrees.data
        if key not in self.passes:
            self.passes[key] = predict_passes(config)
        passes = self.passes[key]
        self.num_memories += 1
        return peak_of(passes, state_memory(config, passes.num_parameters, degree, zero))

    def _candidate(
        self, config: Experiment, memory: MemoryPrediction, zero: ZeroSettings, own_buckets: bool = False
    ) -> Candidate:
        self.num_times += 1
        key, machine = pass_settings(config), self.cluster.machine
        if key not in self.work:
            self.work[key] = predict_work(config, machine)
        step = assemble_step(self.work[key], config, self.cluster.num_ranks, machine, zero)
        needed = self.cluster.needed_bytes(memory)
        return Candidate(config, self.base, zero, memory, needed, step, own_buckets)

    def _with_best_buckets(self, candidate: Candidate) -> Candidate:
        """Return the candidate with faster bucket sizes if they are worth a DeepSpeed file of their own."""
        config = candidate.config
        wider = [candidate.zero.with_buckets(size) for size in bucket_sizes(config)]
        fitting = [
            (zero, memory) for zero in wider if self._shortage(memory := self._memory(config, zero)) <= 0
        ]
        others = [self._candidate(config, memory, zero, own_buckets=True) for zero, memory in fitting]
        best = min(others, key=lambda other: other.order, default=candidate)
        return best if best.step.step_s < _WORTH_A_FILE * candidate.step.step_s else candidate

    def _all_dropped(self, found: Sequence[Candidate]) -> list[Dropped]:
        families: dict[Sharding, list[_VariantResult]] = {}
        variants: dict[Settings, list[_VariantResult]] = {}
        for result in self.results.values():
            families.setdefault(result.sharding, []).append(result)
            variants.setdefault(result.variant, []).append(result)
        for one in found:
            families.pop(one.sharding, None)
            variants.pop(settings_of(one.config, VARIANT), None)
        unused = [(sharding, *_why_unused(results)) for sharding, results in families.items()]
        names: dict[str, list[Experiment]] = {}
        for results in variants.values():
            names.setdefault(_why_unused(results)[0], []).append(results[0].config)
        return [
            *self.dropped,
            *by_reason([*self.refused, *unused]),
            *(Dropped(_variant_names(configs), reason) for reason, configs in names.items()),
        ]


def _why_unused(results: Sequence[_VariantResult]) -> tuple[str, int | None]:
    """Return why none of several variants has a candidate, and the bytes short if memory is the reason."""
    if any(result.fitting for result in results):
        # Details that also fit with faster settings are skipped, so these variants have no candidate.
        return "gains nothing: every micro-batch that fits with it also fits without it", None
    short = [
        (result.shortage_bytes, settings_of(result.shortest, DETAIL), result.shortest)
        for result in results
        if result.shortest
    ]
    shortage, _, config = min(short, key=lambda one: one[:2])
    where = ", ".join([*detail_names(config), _variant_names([config])])
    return f"out of memory by {format_bytes(shortage)} at best ({where})", shortage


def _variant_names(configs: Sequence[Experiment]) -> str:
    """Return one name for the variants of several configs, such as `recompute mlp, full`."""
    columns: dict[str, dict[str, None]] = {}
    for config in configs:
        for column, text in columns_of(config, VARIANT).items():
            columns.setdefault(column, {})[text] = None
    return "; ".join(f"{column} {', '.join(texts)}" for column, texts in columns.items())
