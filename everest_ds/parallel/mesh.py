"""The process groups of a run, created by fairscale; `everest_ds.config.mesh_shape` arranges the ranks."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

from fairscale.nn.model_parallel import initialize as fairscale_groups

from everest_ds.config.mesh_shape import MeshShape, PerAxis, Turn
from everest_ds.parallel.world import World


@dataclass(frozen=True)
class Mesh:
    """The ranks of a world, arranged along the axes of a `MeshShape`."""

    world: World
    shape: MeshShape

    @property
    def degrees(self) -> PerAxis:
        """The number of ranks along each axis."""
        return self.shape.degrees

    @property
    def coordinates(self) -> PerAxis:
        """The index of this rank along each axis: its partition under ZeRO, and its shard of every layer."""
        return self.shape.coordinates(self.world.rank)

    @property
    def share(self) -> int:
        """The index of the share of clips that this rank computes on."""
        return self.shape.share_of(self.world.rank)

    @property
    def turn(self) -> Turn:
        """The turn at which this rank reads batches for its tensor group; see `exchange_batches`."""
        return Turn(self.coordinates.tensor, self.degrees.tensor)

    @property
    def mpu(self) -> Any:
        """The model-parallel unit that DeepSpeed queries for groups; None without tensor parallelism."""
        return fairscale_groups if self.shape.degrees.tensor > 1 else None


def form_mesh(world: World, shape: MeshShape) -> Mesh:
    """Join the groups of this rank; call on every rank. Existing groups of the same size are reused.

    Raises:
        UsageError: on every rank, if a tensor group would span nodes.
    """
    degree = shape.degrees.tensor
    if degree > 1:
        world.together(lambda: shape.check_placement(world.rank, world.local_rank, world.local_size))
        joined = fairscale_groups.model_parallel_is_initialized()
        if joined and fairscale_groups.get_model_parallel_world_size() != degree:
            fairscale_groups.destroy_model_parallel()
            joined = False
        if not joined:
            with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints its layout of the ranks
                fairscale_groups.initialize_model_parallel(degree)
    return Mesh(world, shape)
