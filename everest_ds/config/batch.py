"""Batch arithmetic: global = micro x accumulation x data-parallel ranks, always, and said when it is not."""

from __future__ import annotations

from dataclasses import dataclass, replace

from everest_ds.config.schema import BatchConfig, Experiment
from everest_ds.errors import ConfigError


@dataclass(frozen=True)
class BatchPlan:
    """The resolved batch of one optimiser step, in clips.

    Attributes:
        repeats: clips that are cut from each sample (`data.repeats`).
    """

    micro_batch_size: int
    grad_accum_steps: int
    data_parallel_degree: int
    repeats: int = 1

    @property
    def global_batch_size(self) -> int:
        """Clips of one optimiser step over all ranks."""
        return self.micro_batch_size * self.grad_accum_steps * self.data_parallel_degree

    @property
    def samples_per_step(self) -> int:
        """Samples of one optimiser step: what epochs are divided into and learning rates scale with."""
        return self.global_batch_size // self.repeats

    def __str__(self) -> str:
        return (
            f"{self.global_batch_size} clips = {self.micro_batch_size} per rank and micro-batch"
            f" x {self.grad_accum_steps} accumulated x {self.data_parallel_degree} data-parallel ranks"
            + (f", {self.repeats} from each sample" if self.repeats > 1 else "")
        )


def plan_ranks(config: Experiment, num_ranks: int) -> BatchPlan:
    """The batch of a run on `num_ranks` processes; the ranks that share a layer share their clips too.

    Raises:
        ConfigError: if tensor parallelism does not divide the ranks, or the ranks not the batch.
    """
    return replace(
        plan_batch(config.batch, data_parallel_degree(config, num_ranks)), repeats=config.data.repeats
    )


def data_parallel_degree(config: Experiment, num_ranks: int) -> int:
    """Copies of the model that `num_ranks` hold.

    Raises:
        ConfigError: if tensor parallelism does not divide the ranks.
    """
    tensor = config.parallelism.tensor
    if num_ranks % tensor:
        raise ConfigError(
            "parallelism.tensor does not divide the ranks",
            given=f"tensor={tensor}, {num_ranks} ranks",
            allowed=f"a multiple of {tensor} ranks",
            fix="change the number of ranks or parallelism.tensor",
        )
    return num_ranks // tensor


def plan_batch(batch: BatchConfig, data_parallel_degree: int) -> BatchPlan:
    """Split the global batch over the ranks.

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
    """The global batches around the wanted one that this micro-batch makes up."""
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
