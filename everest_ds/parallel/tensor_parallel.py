"""Tensor parallelism: the ranks of a group share every block, with fairscale's model-parallel layers.

    x ── qkv, split by heads ── attention on own heads ── proj, split by inputs ── sum over the group ──
    x ── fc1, split by outputs ── GELU on own channels ── fc2, split by inputs ── sum over the group ──

Each of the two branches needs one all-reduce in the forward pass and one in the backward pass, of the kept
tokens only. Everything else (embedding, norms, heads, residual stream) is whole and bit-identical on every
rank. So are the clips, the kept tokens and the dropped paths, which are drawn from the clips' keys.

The split layers reuse the dense layers' parameter objects and replace only their data by a shard. A run
therefore starts from the dense model's weights, and optimiser groups built from the dense model stay valid.

Shape legend: n tokens of any clips, I inputs, O outputs; a rank holds 1/t of either I or O.
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
    """A rule for cutting a tensor into shards.

    Attributes:
        dim: the dimension along which the tensor is cut.
        pieces: number of consecutive pieces that are cut separately; 3 for q, k and v in one matrix.
    """

    dim: int
    pieces: int = 1

    def take(self, whole: Tensor, rank: int, degree: int) -> Tensor:
        """Return a copy of the shard of `rank`."""
        parts = [piece.chunk(degree, self.dim)[rank] for piece in whole.chunk(self.pieces, self.dim)]
        return torch.cat(parts, self.dim)

    def merge(self, shards: Sequence[Tensor]) -> Tensor:
        """Return the whole tensor, given all shards in rank order."""
        by_shard = [shard.chunk(self.pieces, self.dim) for shard in shards]
        return torch.cat([part for parts in zip(*by_shard, strict=True) for part in parts], self.dim)


# The split parameters of a block. All others are whole on every rank: the biases of `proj` and `fc2`, for
# example, are added after the all-reduce.
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
        model: with the same weights on every rank, and a number of heads that the tensor degree divides.
        mesh: the ranks of the run.
    """
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        for name, split in SPLITS.items():
            parameter = block.get_parameter(name)
            parameter.data = split.take(parameter.data, mesh.coordinates.tensor, mesh.degrees.tensor)
            # DeepSpeed reads `model_parallel`: without this mark, only tensor rank 0 counts the gradient in
            # the global norm.
            vars(parameter).update(model_parallel=True, shared_by=split)
        attention, mlp = block.attention, block.mlp
        attention.qkv = _QKV(attention.qkv)
        attention.proj = _Row(attention.proj)
        mlp.fc1 = _Column(mlp.fc1)
        mlp.fc2 = _GELURow(mlp.fc2)


def split_of(parameter: Tensor) -> Split | None:
    """Return the rule by which the tensor group shares `parameter`; None if it is whole on every rank."""
    return getattr(parameter, "shared_by", None)


def merge_shards(parameter: Tensor, shard: Tensor) -> Tensor:
    """Gather all shards of a tensor and merge them into the whole. Call on every rank of the tensor group.

    Args:
        parameter: the parameter whose rule applies to `shard`.
        shard: this rank's shard of the parameter's value, or of an optimiser state of it.
    """
    split = split_of(parameter)
    if split is None:
        return shard
    group = get_model_parallel_group()
    shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, shard.detach().contiguous(), group=group)
    return split.merge(shards)


class _Column(ColumnParallelLinear):
    """A linear layer split by outputs: (..., I) -> (..., O/t)."""

    def __init__(self, dense: nn.Linear) -> None:
        nn.Module.__init__(self)  # fairscale's constructor would draw new weights
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.gather_output = False
        self.weight, self.bias = dense.weight, dense.bias

    def forward(self, x_nI: Tensor) -> Tensor:
        return linear(_Copy.apply(x_nI), self.weight, self.bias)


class _QKV(_Column):
    """The projection to queries, keys and values of this rank's heads; the caller passes this rank's bias."""

    def forward(self, x_nI: Tensor, bias_O: Tensor) -> Tensor:  # type: ignore[override]
        return linear(_Copy.apply(x_nI), self.weight, bias_O)


class _Row(RowParallelLinear):
    """A linear layer split by inputs, its outputs summed over the tensor group: (..., I/t) -> (..., O)."""

    def __init__(self, dense: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.input_is_parallel = True
        self.weight, self.bias = dense.weight, dense.bias

    def forward(self, x_nI: Tensor) -> Tensor:
        return _Sum.apply(linear(x_nI, self.weight)) + self.bias


class _GELURow(_Row):
    """A `_Row` layer that applies GELU to its input."""

    def forward(self, x_nI: Tensor, recompute: bool = False) -> Tensor:
        return _Sum.apply(gelu_linear(x_nI, self.weight, None, recompute)) + self.bias


class _Copy(torch.autograd.Function):
    """The identity on the input of a layer split by outputs; backward sums the gradients over the group."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _sum_over_group(gradient)


class _Sum(torch.autograd.Function):
    """The sum over the tensor group, in place in eager mode; the caller must not use the input again.

    fairscale's version marks its input as changed in place, which autograd forbids for outputs of oneDNN's
    linear operator.
    """

    @staticmethod
    def forward(ctx: Any, partial: Tensor) -> Tensor:
        return _sum_over_group(partial.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _sum_over_group(part: Tensor) -> Tensor:
    """Return the sum of `part` over the tensor group; in eager mode, `part` is overwritten.

    TorchDynamo (torch 2.11) silently drops an in-place change inside an autograd function, so compiled code
    uses the functional collective. The compiler may still reuse the memory.
    """
    group = get_model_parallel_group()
    if torch.compiler.is_compiling():
        return functional.wait_tensor(functional.all_reduce(part, "sum", group))
    dist.all_reduce(part, group=group)
    return part
