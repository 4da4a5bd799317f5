"""The mesh of data-parallel x tensor-parallel ranks, built on fairscale's process groups.

Ranks 0 .. t-1 hold one copy of the model between them, ranks t .. 2t-1 the next:

    rank    0 1 | 2 3 | 4 5      t = 2: two neighbours form a tensor group, and
    tensor  0 1 | 0 1 | 0 1      all ranks with the same tensor rank form a data group.
    data    0 0 | 1 1 | 2 2

Every layer ends in an all-reduce over the tensor group, so the group must lie within one node.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

from fairscale.nn.model_parallel import initialize as fairscale_groups

from everest_ds.errors import UsageError
from everest_ds.parallel.world import World


@dataclass(frozen=True)
class Mesh:
    """The ranks of a world, arranged as data_degree x tensor_degree."""

    world: World
    tensor_degree: int = 1

    @property
    def tensor_rank(self) -> int:
        """The index of this rank within its tensor group, whose ranks share every layer."""
        return self.world.rank % self.tensor_degree

    @property
    def data_rank(self) -> int:
        """The index of the share of clips that this rank reads; the same within a tensor group."""
        return self.world.rank // self.tensor_degree

    @property
    def data_degree(self) -> int:
        """The number of copies of the model."""
        return self.world.size // self.tensor_degree

    @property
    def mpu(self) -> Any:
        """The model-parallel unit that DeepSpeed queries for groups; None without tensor parallelism."""
        return fairscale_groups if self.tensor_degree > 1 else None


def form_mesh(world: World, tensor_degree: int) -> Mesh:
    """Lay out the ranks and join this rank's groups; call on every rank. Existing groups are reused.

    Raises:
        UsageError: on every rank, if a tensor group would span nodes.
    """
    mesh = Mesh(world, tensor_degree)
    if tensor_degree > 1:
        world.together(lambda: _check_within_node(mesh))
        _join_groups(tensor_degree)
    return mesh


def _check_within_node(mesh: Mesh) -> None:
    """Check that all ranks of this rank's tensor group exist on this node, by the launcher's local ranks."""
    world = mesh.world
    first = world.local_rank - mesh.tensor_rank
    if first < 0 or first + mesh.tensor_degree > world.local_size:
        raise UsageError(
            f"parallelism.tensor: rank {world.rank} has ranks of its tensor group on another node",
            given=f"tensor={mesh.tensor_degree}, rank {world.local_rank} of {world.local_size} on its node",
            allowed="ranks in order of nodes, and on each node a multiple of the tensor degree",
            fix="change parallelism.tensor or the ranks per node (--ntasks-per-node, --distribution=block)",
        )


def _join_groups(tensor_degree: int) -> None:
    if fairscale_groups.model_parallel_is_initialized():
        if fairscale_groups.get_model_parallel_world_size() == tensor_degree:
            return
        fairscale_groups.destroy_model_parallel()
    with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints its layout of the ranks
        fairscale_groups.initialize_model_parallel(tensor_degree)
