"""Tensor parallelism: the ranks of a group share every block, by fairscale's model-parallel layers.

    x ── qkv, split by heads ── attention on own heads ── proj, split by inputs ── sum over the group ──
    x ── fc1, split by outputs ── GELU on own channels ── fc2, split by inputs ── sum over the group ──

Each of the two branches costs one sum forward and one backward, of kept tokens only. The rest (embedding,
norms, heads, the residual stream) is whole on every rank, and the same in every bit; so are the clips, the
tokens chosen and the paths dropped, which follow from the clips' keys.

The split layers take over the parameters of the dense ones, as the same objects with a shard in them: a run
starts from the dense run's weights, and optimiser groups made of the dense model stay right.

Shape legend: n tokens of any clips, I inputs, O outputs; a rank holds a t-th of one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from everest_ds.models.linear import linear
from everest_ds.models.mlp import gelu_linear
from everest_ds.models.vit import Block
from everest_ds.parallel.mesh import Mesh


@dataclass(frozen=True)
class Split:
    """How a tensor is cut into shards.

    Attributes:
        dim: along which it is cut.
        pieces: of which each is cut for itself: q, k and v lie in one matrix, one after the other.
    """

    dim: int
    pieces: int = 1

    def take(self, whole: Tensor, rank: int, degree: int) -> Tensor:
        """The shard of `rank`, in memory of its own."""
        parts = [piece.chunk(degree, self.dim)[rank] for piece in whole.chunk(self.pieces, self.dim)]
        return torch.cat(parts, self.dim)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole, of all shards in rank order."""
        by_shard = [shard.chunk(self.pieces, self.dim) for shard in shards]
        return torch.cat([part for parts in zip(*by_shard, strict=True) for part in parts], self.dim)


# Of a block; what is not named is whole on every rank. Biases of `proj` and `fc2` are added after the sum.
SPLITS = {
    "attention.qkv.weight": Split(0, pieces=3),
    "attention.q_bias": Split(0),
    "attention.v_bias": Split(0),
    "attention.proj.weight": Split(1),
    "mlp.fc1.weight": Split(0),
    "mlp.fc1.bias": Split(0),
    "mlp.fc2.weight": Split(1),
}


def apply_tensor_parallel(model: nn.Module, mesh: Mesh) -> None:
    """Split the blocks of a dense `model`, in place, over the tensor groups of `mesh`.

    Args:
        model: with the same weights on every rank, and heads that the tensor degree divides.
    """
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        for name, split in SPLITS.items():
            _keep_shard(block.get_parameter(name), split, mesh)
        attention, mlp = block.attention, block.mlp
        attention.qkv = _QKV(attention.qkv)
        attention.proj = _Row(attention.proj)
        mlp.fc1 = _Column(mlp.fc1)
        mlp.fc2 = _GELURow(mlp.fc2)


def split_of(parameter: Tensor) -> Split | None:
    """How `parameter` is shared by its tensor group; None if it is whole on every rank."""
    return getattr(parameter, "shared_by", None)


def merge_shards(parameter: Tensor, shard: Tensor) -> Tensor:
    """The whole of a tensor that is shared as `parameter` is: itself, or a state of the optimiser.

    Call on every rank of the tensor group.
    """
    split = split_of(parameter)
    if split is None:
        return shard
    group = get_model_parallel_group()
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, shard.detach().contiguous(), group=group)
    return split.merge(shards)


def _keep_shard(parameter: nn.Parameter, split: Split, mesh: Mesh) -> None:
    parameter.data = split.take(parameter.data, mesh.tensor_rank, mesh.tensor_degree)
    # DeepSpeed's mark: of unmarked parameters, only tensor rank 0 counts the gradients in the global norm.
    vars(parameter).update(model_parallel=True, shared_by=split)


class _Column(ColumnParallelLinear):
    """Own outputs of whole inputs: (..., I) -> (..., O/t)."""

    def __init__(self, dense: nn.Linear) -> None:
        nn.Module.__init__(self)  # fairscale's own would draw new weights
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.gather_output = False
        self.weight, self.bias = dense.weight, dense.bias

    def forward(self, x_nI: Tensor) -> Tensor:
        return linear(_Copy.apply(x_nI), self.weight, self.bias)


class _QKV(_Column):
    """Queries, keys and values of own heads; the bias comes with the input, split as they are."""

    def forward(self, x_nI: Tensor, bias_O: Tensor) -> Tensor:  # type: ignore[override]
        return linear(_Copy.apply(x_nI), self.weight, bias_O)


class _Row(RowParallelLinear):
    """Whole outputs of own inputs, summed over the group: (..., I/t) -> (..., O)."""

    def __init__(self, dense: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.input_is_parallel = True
        self.weight, self.bias = dense.weight, dense.bias

    def forward(self, x_nI: Tensor) -> Tensor:
        return _Sum.apply(linear(x_nI, self.weight)) + self.bias


class _GELURow(_Row):
    """`_Row` of GELU(x)."""

    def forward(self, x_nI: Tensor, recompute: bool = False) -> Tensor:
        return _Sum.apply(gelu_linear(x_nI, self.weight, None, recompute)) + self.bias


class _Copy(torch.autograd.Function):
    """The input of a layer that is split by outputs: the gradients of all ranks' parts add up."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _sum_over_group(gradient)


class _Sum(torch.autograd.Function):
    """The sum over the tensor group; nobody else has the input's memory, which eager code reuses.

    fairscale's marks its input as changed, which autograd forbids for what oneDNN's linear returns.
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        return _sum_over_group(partial.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _sum_over_group(part: Tensor) -> Tensor:
    """Return the sum of `part` over the tensor group, in the memory of `part` unless it is being compiled.

    Dynamo of torch 2.11 loses a change of memory inside an autograd function without a word, so a graph gets
    the collective that returns its result. Its compiler may reuse the memory, too.
    """
    group = get_model_parallel_group()
    if torch.compiler.is_compiling():
        return functional.wait_tensor(functional.all_reduce(part, "sum", group))
    dist.all_reduce(part, group=group)
    return part
