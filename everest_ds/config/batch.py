"""Batch arithmetic: global batch = micro-batch x accumulation steps x data-parallel ranks, or an error."""

from __future__ import annotations

from dataclasses import dataclass, replace

from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.schema import BatchConfig, Experiment
from everest_ds.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """The resolved batch of one optimiser step, in clips.

    Attributes:
        micro_batch_size: clips per rank in one forward and backward pass.
        grad_accum_steps: micro-batches per rank in one optimiser step.
        data_parallel_degree: data-parallel ranks, each with its own clips.
        repeats: clips that are cut from each sample (`data.repeats`).
    """

    micro_batch_size: int
    grad_accum_steps: int
    data_parallel_degree: int
    repeats: int = 1

    @property
    def global_batch_size(self) -> int:
        """The clips of one optimiser step, over all ranks."""
        return self.micro_batch_size * self.grad_accum_steps * self.data_parallel_degree

    @property
    def samples_per_step(self) -> int:
        """The samples of one optimiser step; epoch lengths and learning rates follow this number."""
        return self.global_batch_size // self.repeats

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} clips = {self.micro_batch_size} per rank and micro-batch"
            f" x {self.grad_accum_steps} accumulated x {self.data_parallel_degree} data-parallel ranks"
            + (f", {self.repeats} from each sample" if self.repeats > 1 else "")
        )


def plan_ranks(config: Experiment, num_ranks: int) -> BatchPlan:
    """Return the batch plan of a run on `num_ranks` ranks; tensor-parallel ranks share their clips.

    Raises:
        ConfigError: if the tensor-parallel degree does not divide the ranks, or the data-parallel ranks
            do not divide the batch.
    """
    plan = plan_batch(config.batch, MeshShape.of(config, num_ranks).num_shares)
    return replace(plan, repeats=config.data.repeats)


def plan_batch(batch: BatchConfig, data_parallel_degree: int) -> BatchPlan:
    """Split the global batch over data-parallel ranks and accumulation steps.

    Raises:
        ConfigError: if the ranks and micro-batches do not divide the global batch.
    """
    per_micro_step = batch.micro_batch_size * data_parallel_degree
    if batch.global_batch_size is None:
        return BatchPlan(batch.micro_batch_size, batch.grad_accum_steps or 1, data_parallel_degree)
    accum, rest = divmod(batch.global_batch_size, per_micro_step)
    if rest or accum == 0 or (batch.grad_accum_steps or accum) != accum:
        raise _does_not_divide(batch, data_parallel_degree)
    return BatchPlan(batch.micro_batch_size, accum, data_parallel_degree)


def _nearest(batch: BatchConfig, degree: int) -> str:
    """Name the global batch sizes closest to the requested size that this micro-batch can form."""
    step = batch.micro_batch_size * degree * (batch.grad_accum_steps or 1)
    below = (batch.global_batch_size or 0) // step * step
    sizes = " or ".join(str(size) for size in (below, below + step) if size)
    return f"nearest with micro_batch_size={batch.micro_batch_size}: {sizes} (learning rates follow)"


def _does_not_divide(batch: BatchConfig, degree: int) -> ConfigError:
    total = batch.global_batch_size or 0
    accum = batch.grad_accum_steps
    micro = [m for m in range(1, total + 1) if total % (m * degree * (accum or 1)) == 0]
    fitting = [m for m in micro if accum is None or m * degree * accum == total]
    return ConfigError(
        "batch.global_batch_size does not divide over the ranks",
        given=f"global_batch_size={total}, micro_batch_size={batch.micro_batch_size}, "
        f"grad_accum_steps={accum or 'auto'}, {degree} data-parallel ranks",
        allowed=f"micro_batch_size in {fitting}"
        if fitting
        else f"a global_batch_size that is a multiple of {degree * (accum or 1)}; {_nearest(batch, degree)}",
        fix="change batch.micro_batch_size, batch.global_batch_size or the number of ranks",
    )
