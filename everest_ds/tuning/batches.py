"""The global batch on a number of ranks: how it is split, and the nearest size that can be split."""

from __future__ import annotations

from collections.abc import Sequence

from everest_ds.config.checks import check_sections_agree
from everest_ds.config.mesh_shape import MeshShape, largest_shape, possible_shapes
from everest_ds.config.schema import BatchConfig, Experiment
from everest_ds.errors import ConfigError, EverestError, UsageError


def with_micro_batch(config: Experiment, micro_batch_size: int) -> Experiment:
    """Return the config with another micro-batch size; accumulation follows from the global batch."""
    total = config.batch.global_batch_size
    batch = BatchConfig.model_construct(
        micro_batch_size=micro_batch_size, global_batch_size=total, grad_accum_steps=None
    )
    return config.model_copy(update={"batch": batch})


def check_agreement(config: Experiment) -> None:
    """Run the schema's checks across sections on a config whose sections were replaced.

    Raises:
        ConfigError: the sections contradict each other.
    """
    try:
        check_sections_agree(config)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def agrees(config: Experiment) -> bool:
    """Return whether the sections of the config agree."""
    try:
        check_agreement(config)
    except EverestError:
        return False
    return True


def smallest_micro_batch(config: Experiment) -> int:
    """Return the smallest micro-batch size that the config's other sections allow."""
    own = config.batch.micro_batch_size  # is allowed, so the search below always finds a size
    return next(clips for clips in range(1, own + 1) if agrees(with_micro_batch(config, clips)))


def keep_global_batch(config: Experiment, num_ranks: int, total: int | None = None) -> Experiment:
    """Return the config with a fixed global batch: `total` clips, or its own on `num_ranks` ranks."""
    batch = config.batch
    shares = largest_shape(config, num_ranks).num_shares
    own = batch.micro_batch_size * (batch.grad_accum_steps or 1) * shares
    kept = batch.model_copy(update={"global_batch_size": total or batch.global_batch_size or own})
    return config.model_copy(update={"batch": kept})


def clips_per_group(config: Experiment, num_ranks: int) -> int:
    """Return the clips per step of one data-parallel rank, which is a tensor-parallel group of ranks."""
    return (config.batch.global_batch_size or 0) // MeshShape.of(config, num_ranks).num_shares


def nothing_runs(
    config: Experiment, num_ranks: int, ranks_per_node: int, reasons: Sequence[str]
) -> UsageError:
    """Return the error of a search in which every sharding was refused for one of `reasons`.

    If no tensor degree can split the global batch, the error names the nearest sizes that can be split.
    """
    total, unit = config.batch.global_batch_size or 0, smallest_micro_batch(config)
    shapes = possible_shapes(config, num_ranks, ranks_per_node)
    steps = {shape.num_shares * unit for shape in shapes}
    if any(total % step == 0 for step in steps):
        fix = "leave out some of the given keys"
        return UsageError("no candidate can run", given="; or ".join(reasons), fix=fix)
    near = {step * (total // step + more) for step in steps for more in (0, 1)} - {0}
    below, above = [n for n in near if n <= total], [n for n in near if n > total]
    nearest = sorted({max(below, default=min(above)), min(above)})
    return UsageError(
        "batch.global_batch_size cannot be split over the ranks",
        given=f"{total} clips, {num_ranks} ranks",
        allowed=f"nearest sizes: {' or '.join(map(str, nearest))}",
        fix=f"--global-batch {nearest[-1]}, or another number of ranks",
    )
