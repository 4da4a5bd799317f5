"""The arrangement of the ranks of a run: data parallelism x tensor parallelism.

All arithmetic of ranks is here: divisions, coordinates, groups, the allowed degrees, and the errors about
ranks that do not fit. Neighbouring ranks form a tensor group, because every layer ends in an all-reduce over
that group; it must lie within one node:

    rank     0 1 | 2 3 | 4 5      tensor degree 2, data degree 3
    tensor   0 1 | 0 1 | 0 1      a tensor group holds one copy of the model between its ranks
    data     0 0 | 1 1 | 2 2      all ranks with the same tensor coordinate form a data group

To add an axis, add a field to `PerAxis`, in the order of nesting, and set its degree in `MeshShape.over`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar, get_args

from everest_ds.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from everest_ds.config.schema import Experiment

Axis = Literal["data", "tensor"]
TensorDegree = Literal[1, 2, 4, 8]
TENSOR_DEGREES: tuple[int, ...] = get_args(TensorDegree)
T = TypeVar("T")


class PerAxis(NamedTuple):
    """One number per axis, outermost axis first: neighbouring ranks differ along the last axis."""

    data: int
    tensor: int


class Turn(NamedTuple):
    """The turn of a rank among the ranks of its tensor group, which read the batches of the group in turn.

    Attributes:
        place: index of the rank in its group.
        ranks: number of ranks in the group.
    """

    place: int = 0
    ranks: int = 1

    def own(self, batches: Iterable[T]) -> Iterator[T]:
        """Return those of the group's batches that this rank reads."""
        return islice(batches, self.place, None, self.ranks)


@dataclass(frozen=True)
class RankGroup:
    """The ranks of a collective.

    Attributes:
        ranks: n, the number of ranks.
        nodes: m, the number of nodes; each holds equally many ranks.
        sharing: groups per node that communicate at the same time.
    """

    ranks: int
    nodes: int = 1
    sharing: int = 1

    @property
    def inside(self) -> int:
        """The number g of ranks of the group on each node."""
        return self.ranks // self.nodes


@dataclass(frozen=True)
class MeshShape:
    """The degrees of all axes, and the size of a node.

    Attributes:
        degrees: the number of ranks along each axis; their product is the number of all ranks.
        ranks_per_node: ranks on each node; None if all ranks are on one node, or if that does not matter.
    """

    degrees: PerAxis
    ranks_per_node: int | None = None

    @classmethod
    def of(cls, config: Experiment, num_ranks: int, ranks_per_node: int | None = None) -> MeshShape:
        """Arrange `num_ranks` ranks in tensor groups of the configured degree.

        Raises:
            ConfigError: if the tensor-parallel degree does not divide the ranks.
        """
        return cls.over(num_ranks, config.parallelism.tensor, ranks_per_node)

    @classmethod
    def over(cls, num_ranks: int, tensor: int = 1, ranks_per_node: int | None = None) -> MeshShape:
        """Arrange `num_ranks` ranks in tensor groups of `tensor` ranks each.

        Raises:
            ConfigError: if the tensor-parallel degree does not divide the ranks.
        """
        data, rest = divmod(num_ranks, tensor)
        if rest:
            raise ConfigError(
                "parallelism.tensor does not divide the number of ranks",
                given=f"tensor={tensor}, {num_ranks} ranks",
                allowed=f"a multiple of {tensor} ranks",
                fix="change the number of ranks or parallelism.tensor",
            )
        return cls(PerAxis(data, tensor), ranks_per_node)

    @property
    def num_shares(self) -> int:
        """The number of shares into which the clips of a step are divided; a tensor group gets one share."""
        return self.degrees.data

    def share_of(self, rank: int) -> int:
        """Return the index of the share of clips that `rank` computes on."""
        return self.coordinates(rank).data

    @property
    def num_ranks(self) -> int:
        """The number of all ranks."""
        return prod(self.degrees)

    def coordinates(self, rank: int) -> PerAxis:
        """Return the index of `rank` along each axis."""
        indices = []
        for degree in reversed(self.degrees):
            rank, index = divmod(rank, degree)
            indices.append(index)
        return PerAxis(*reversed(indices))

    def groups(self, axis: Axis) -> list[list[int]]:
        """Return the groups of ranks that differ along `axis` only, ordered by their first ranks."""
        groups: dict[PerAxis, list[int]] = {}
        for rank in range(self.num_ranks):
            others = self.coordinates(rank)._replace(**{axis: 0})
            groups.setdefault(others, []).append(rank)
        return list(groups.values())

    def group(self, axis: Axis) -> RankGroup:
        """Return the size of a group along `axis`, and how such groups lie on the nodes."""
        position = PerAxis._fields.index(axis)
        degree, stride = self.degrees[position], prod(self.degrees[position + 1 :])
        a_node = self.ranks_per_node or self.num_ranks
        return RankGroup(degree, min(-(-degree * stride // a_node), degree), min(stride, a_node))

    def check_placement(self, rank: int, local_rank: int, local_size: int) -> None:
        """Check that all ranks of the tensor group of `rank` are on its node.

        Args:
            rank: a rank of the run.
            local_rank: its index on its node, as the launcher gave it.
            local_size: the number of ranks on its node.

        Raises:
            UsageError: if the tensor group spans nodes.
        """
        degree, first = self.degrees.tensor, local_rank - self.coordinates(rank).tensor
        if first < 0 or first + degree > local_size:
            raise UsageError(
                f"parallelism.tensor: rank {rank} has ranks of its tensor group on another node",
                given=f"tensor={degree}, rank {local_rank} of {local_size} on its node",
                allowed="ranks in order of nodes, and on each node a multiple of the tensor degree",
                fix="change parallelism.tensor or the ranks per node"
                " (--ntasks-per-node, --distribution=block)",
            )

    def __str__(self) -> str:
        data, tensor = self.degrees
        shared = f" x {tensor} tensor-parallel (adjacent ranks of a node)" if tensor > 1 else ""
        return f"{self.num_ranks} = {data} data-parallel{shared}"


def largest_shape(config: Experiment, num_ranks: int) -> MeshShape:
    """Return the largest arrangement of at most `num_ranks` ranks, with at least one tensor group."""
    tensor = config.parallelism.tensor
    return MeshShape(PerAxis(max(1, num_ranks // tensor), tensor))


def possible_shapes(config: Experiment, num_ranks: int, ranks_per_node: int) -> Iterator[MeshShape]:
    """Yield the arrangements of all ranks at every tensor degree that the model and the nodes allow."""
    for tensor in _degrees_that_divide(num_ranks, ranks_per_node, *_heads(config).values()):
        yield MeshShape.over(num_ranks, tensor, ranks_per_node)


def check_degrees(config: Experiment) -> None:
    """Check that the tensor-parallel degree divides the attention heads, and thereby every split width.

    Raises:
        ValueError: if the degree does not divide the heads; the message names the degrees that do.
    """
    heads = _heads(config)
    allowed = _degrees_that_divide(*heads.values())
    if config.parallelism.tensor not in allowed:
        raise ValueError(
            f"parallelism.tensor={config.parallelism.tensor} does not divide the heads of"
            f" {config.model.backbone} ({', '.join(f'{name} {h}' for name, h in heads.items())});"
            f" allowed: {', '.join(map(str, allowed))}"
        )


def check_nodes_of_job(config: Experiment, ranks_per_node: int) -> None:
    """Check that the tensor groups of a job fit its nodes.

    Raises:
        ConfigError: if a tensor group would span nodes.
    """
    tensor = config.parallelism.tensor
    if ranks_per_node % tensor:
        raise ConfigError(
            "parallelism.tensor: a tensor group would span nodes",
            given=f"tensor={tensor}, {ranks_per_node} ranks per node",
            allowed=f"a multiple of {tensor} ranks per node",
            fix="change --gpus-per-node or parallelism.tensor",
        )


def check_searched_degree(tensor: int, num_ranks: int, ranks_per_node: int) -> None:
    """Check that the tuner may try a tensor degree; the message says why candidates are left out.

    Raises:
        ConfigError: if the degree does not divide the ranks of a node or of the run.
    """
    subject = f"parallelism.tensor={tensor} does not divide the ranks of"
    if ranks_per_node % tensor:
        raise ConfigError(f"{subject} a node", given=f"{ranks_per_node} ranks per node")
    if num_ranks % tensor:
        raise ConfigError(f"{subject} the run", given=f"{num_ranks} ranks")


def _heads(config: Experiment) -> dict[str, int]:
    shape = config.model.shape
    heads = {"encoder": shape.encoder.heads}
    return heads | {"decoder": shape.decoder.heads} if config.task == "pretrain" else heads


def _degrees_that_divide(*counts: int) -> list[int]:
    return [degree for degree in TENSOR_DEGREES if all(count % degree == 0 for count in counts)]
