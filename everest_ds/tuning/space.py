"""The search space: shardings, recompute modes and micro-batches that can run, and why the others cannot.

No choice changes what is learned: the global batch is kept, and so is the precision unless the device lacks
it or others are asked for. The config's own checks find impossible combinations; none is repeated here. A
pinned key keeps the config's value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from everest_ds.config.mesh_shape import TENSOR_DEGREES, MeshShape, check_searched_degree
from everest_ds.config.schema import Experiment, ParallelismConfig, RecomputeConfig
from everest_ds.errors import ConfigError
from everest_ds.tuning.batches import agrees, check_agreement, smallest_micro_batch, with_micro_batch

STAGES = (0, 1, 2, 3)
OFFLOADING_STAGES = (2, 3)  # stages whose offload has a shipped DeepSpeed file
EVERY = (2, 3, 4)
# Keys whose values are searched unless they are pinned on the command line.
SEARCHED = frozenset(
    "precision batch.micro_batch_size batch.grad_accum_steps parallelism.tensor parallelism.zero_stage"
    " parallelism.offload_to_cpu recompute.mode recompute.every recompute.offload_to_cpu recompute.partition"
    "".split()
)
Value = TypeVar("Value")


class Sharding(NamedTuple):
    """A family of candidates with the same ZeRO stage, tensor degree, offload and precision."""

    precision: str
    stage: int
    tensor: int
    offload: bool

    def __str__(self) -> str:
        tensor = f", tensor {self.tensor}" if self.tensor > 1 else ""
        return f"ZeRO-{self.stage}{tensor}{', offload' if self.offload else ''}, {self.precision}"


class Dropped(NamedTuple):
    """A family without a candidate, and the reason.

    Attributes:
        family: human-readable name, such as `ZeRO-0, bf16`.
        reason: why the family has no candidate.
        shortage_bytes: least shortage of memory; None if the reason is another.
    """

    family: str
    reason: str
    shortage_bytes: int | None = None


def by_reason(shardings: Iterable[tuple[Sharding, str, int | None]]) -> Iterator[Dropped]:
    """Merge shardings with the same reason and shortage: a line each for up to 24 would be too many."""
    reasons: dict[tuple[str, int | None], list[Sharding]] = {}
    for sharding, reason, shortage in shardings:
        reasons.setdefault((reason, shortage), []).append(sharding)
    for (reason, shortage), alike in reasons.items():
        yield Dropped(_together(alike), reason, shortage)


def _together(shardings: Sequence[Sharding]) -> str:
    """Return one name for several shardings, such as `ZeRO-2, 2 offload; tensor 1, 2; bf16`."""
    if len(shardings) == 1:
        return str(shardings[0])
    stages = sorted({f"{one.stage}{' offload' if one.offload else ''}" for one in shardings})
    tensors, precisions = (
        sorted({one.tensor for one in shardings}),
        sorted({one.precision for one in shardings}),
    )
    return f"ZeRO-{', '.join(stages)}; tensor {', '.join(map(str, tensors))}; {', '.join(precisions)}"


@dataclass(frozen=True)
class Space:
    """The search space of one config on one cluster.

    Attributes:
        config: the recipe, with its global batch.
        num_ranks: number of ranks on all nodes.
        ranks_per_node: number of ranks on a node, within which a tensor group must lie.
        precisions: precisions to try.
        pinned: keys of `SEARCHED` that keep the config's value.
        offloads: whether the host has memory besides the device's.
    """

    config: Experiment
    num_ranks: int
    ranks_per_node: int
    precisions: Sequence[str]
    pinned: Collection[str] = ()
    offloads: bool = True

    def shardings(self) -> Iterator[Sharding]:
        """Yield every sharding that the pinned keys allow; `sharded` refuses those that cannot run."""
        parallelism = self.config.parallelism
        own_file = parallelism.ds_config is not None  # the file fixes the stage and the offload
        for precision in self.precisions:
            for stage in (parallelism.zero_stage,) if own_file else self._axis("zero_stage", STAGES):
                offload = (False,) if own_file or not self.offloads else self._offload(stage)
                for tensor in self._axis("tensor", TENSOR_DEGREES):
                    for offloads in offload:
                        yield Sharding(precision, stage, tensor, offloads)

    def sharded(self, sharding: Sharding) -> Experiment:
        """Return the config in a sharding, with its smallest possible micro-batch and without recompute.

        Raises:
            ConfigError: the sharding cannot run on these ranks; the message is the human-readable reason.
        """
        check_searched_degree(sharding.tensor, self.num_ranks, self.ranks_per_node)
        try:
            parallelism = ParallelismConfig(
                **{
                    **self.config.parallelism.model_dump(),
                    "zero_stage": sharding.stage,
                    "tensor": sharding.tensor,
                    "offload_to_cpu": sharding.offload,
                    "offload_to_nvme": None,
                }
            )
        except ValidationError as error:
            raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        changed = {
            "precision": sharding.precision,
            "parallelism": parallelism,
            "recompute": RecomputeConfig(),
        }
        return self._with_micro_batch(self.config.model_copy(update=changed))

    def micro_batches(self, sharded: Experiment) -> list[int]:
        """Return the micro-batch sizes that keep the global batch, ascending."""
        share = self._share(sharded)
        allowed = [m for m in range(1, share + 1) if share % m == 0 and self._keeps_pins(m, share // m)]
        return [m for m in allowed if agrees(with_micro_batch(sharded, m))]

    def recomputes(self, sharded: Experiment) -> list[RecomputeConfig]:
        """Return the allowed recompute settings, starting with no recompute if that is allowed."""
        own = self.config.recompute.model_dump()
        settings = [
            own | {"mode": mode, "every": every, "offload_to_cpu": offload, "partition": partition}
            for mode, every in self._modes(sharded.model.shape.encoder.depth)
            for offload in (False, True)
            for partition in (False, True)
        ]
        possible = [RecomputeConfig(**one) for one in settings if self._keeps(one) and self._has_host(one)]
        return [one for one in possible if agrees(sharded.model_copy(update={"recompute": one}))]

    def _with_micro_batch(self, sharded: Experiment) -> Experiment:
        total, degree = self.config.batch.global_batch_size or 0, self._num_shares(sharded)
        if total % degree or total < degree:
            raise ConfigError(f"{total} clips cannot be split evenly over {degree} data-parallel ranks")
        smallest = with_micro_batch(sharded, smallest_micro_batch(self.config))
        check_agreement(smallest)
        if not self.micro_batches(smallest):
            share = self._share(sharded)
            raise ConfigError(f"no allowed micro-batch divides the {share} clips of a data-parallel rank")
        return smallest

    def _share(self, sharded: Experiment) -> int:
        """Return the clips per data-parallel rank and step."""
        return (self.config.batch.global_batch_size or 0) // self._num_shares(sharded)

    def _num_shares(self, sharded: Experiment) -> int:
        return MeshShape.of(sharded, self.num_ranks).num_shares

    def _keeps_pins(self, micro: int, accumulated: int) -> bool:
        batch, pinned = self.config.batch, self.pinned
        pins_accum = "batch.grad_accum_steps" in pinned and batch.grad_accum_steps
        return ("batch.micro_batch_size" not in pinned or micro == batch.micro_batch_size) and (
            not pins_accum or accumulated == batch.grad_accum_steps
        )

    def _axis(self, key: str, values: tuple[Value, ...]) -> tuple[Value, ...]:
        if f"parallelism.{key}" in self.pinned:
            return (getattr(self.config.parallelism, key),)
        return values

    def _offload(self, stage: int) -> tuple[bool, ...]:
        return self._axis("offload_to_cpu", (False, True) if stage in OFFLOADING_STAGES else (False,))

    def _modes(self, depth: int) -> list[tuple[str, int]]:
        own = self.config.recompute.every
        blocks = [("blocks", every) for every in EVERY if every <= depth]
        return [("none", own), ("gelu", own), ("attention", own), ("mlp", own), *blocks, ("full", own)]

    def _keeps(self, recompute: dict[str, Any]) -> bool:
        own = self.config.recompute.model_dump()
        return all(own[key] == value for key, value in recompute.items() if f"recompute.{key}" in self.pinned)

    def _has_host(self, recompute: dict[str, Any]) -> bool:
        return self.offloads or not recompute["offload_to_cpu"]
