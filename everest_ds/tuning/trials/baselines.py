"""The baselines of a tuning run: plain data parallelism, and the recipe with ZeRO-2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from everest_ds.config import Experiment, plan_ranks
from everest_ds.errors import ConfigError

_WHOLE_BATCHES = "batch.grad_accum_steps=null"
# Plain: no state is sharded, offloaded to the host or computed twice.
_PLAIN = (
    "parallelism.tensor=1",
    "parallelism.offload_to_cpu=false",
    "parallelism.offload_to_nvme=null",
    "parallelism.ds_config=null",
    "recompute.mode=none",
    "recompute.offload_to_cpu=false",
    "recompute.partition=false",
)

Load = Callable[[Sequence[str]], Experiment]


@dataclass(frozen=True)
class Baseline:
    """A config for comparison; `note` says how it differs from what its name promises."""

    name: str
    overrides: tuple[str, ...]
    config: Experiment
    note: str = ""


def natural_baselines(load: Load, num_ranks: int, global_batch: int) -> list[Baseline]:
    """Return the baselines that are possible for a recipe.

    Args:
        load: returns the recipe's config under overrides; raises ConfigError for an invalid config.
        num_ranks: number of ranks.
        global_batch: clips per step of all ranks.
    """
    plain, reason = _first_of(load, [(f"parallelism.zero_stage={stage}", *_PLAIN) for stage in (0, 1)])
    zero2, _ = _first_of(load, [("parallelism.zero_stage=2", "parallelism.ds_config=null")])
    named = (("plain data parallelism", plain, reason), ("ZeRO-2", zero2, ""))
    found = (_with_batch(load, name, way, num_ranks, global_batch, why) for name, way, why in named if way)
    return [baseline for baseline in found if baseline]


def _first_of(load: Load, ways: Sequence[tuple[str, ...]]) -> tuple[tuple[str, ...] | None, str]:
    """Return the first valid set of overrides, and why the set before it is invalid."""
    reason = ""
    for way in ways:
        try:
            load(way)
        except ConfigError as error:
            reason = str(error).partition("config: ")[2] or str(error)
        else:
            return way, reason
    return None, reason


def _with_batch(
    load: Load, name: str, overrides: tuple[str, ...], num_ranks: int, global_batch: int, note: str
) -> Baseline | None:
    """Return a baseline with the largest micro-batch, up to the recipe's, that divides the global batch."""
    for micro in range(load(overrides).batch.micro_batch_size, 0, -1):
        batch = (f"batch.micro_batch_size={micro}", f"batch.global_batch_size={global_batch}", _WHOLE_BATCHES)
        try:
            config = load((*overrides, *batch))
            plan_ranks(config, num_ranks)
        except ConfigError:
            continue
        return Baseline(name, (*overrides, *batch), config, note)
    return None
