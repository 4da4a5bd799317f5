"""Tests of the description of a block, against models/vit.py: a change of its block makes them fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from everest_ds.costs import block
from everest_ds.models.attention import ATTENTION
from everest_ds.models.vit import Block, Scales
from everest_ds.parallel.tensor_parallel import SPLITS
from everest_ds.profiling.launches import count_launches
from everest_ds.profiling.mac_counter import count_forward, count_training_step
from everest_ds.profiling.memory_trace import trace_memory

WIDTH, HEADS, CLIPS, TOKENS = 32, 2, 2, 80
ROWS = CLIPS * TOKENS  # more than MLP_RATIO · WIDTH, so that every tensor of tokens exceeds every matrix
LINEAR = [operator for operator in block.OPERATORS if operator.is_linear]
# Products and attention have rates of their own; the stack of gradients is part of attention.
NOT_MOVING = {"mm", "addmm", "stack", "_unsafe_view"}


class MovedValues(TorchDispatchMode):
    """A dispatch mode that counts the token values that operators without a product read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (func.is_view or name in NOT_MOVING or "attention" in name):
            tensors = [leaf for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
            self.values += sum(t.numel() for t in tensors if t.numel() >= ROWS * WIDTH)
        return out


def both_passes(
    measure: Callable[[Callable[[], object]], int], scales: Scales | None = None
) -> block.PerPass:
    """Return what `measure` finds in the forward and in the backward pass of a real block."""
    module, x = Block(WIDTH, HEADS), torch.randn(CLIPS, TOKENS, WIDTH, requires_grad=True)
    outputs: list[Tensor] = []
    forward = measure(lambda: outputs.append(module(x, scales)))
    gradient = torch.ones_like(x)
    return block.PerPass(forward, measure(lambda: outputs[0].backward(gradient)))


def launched(call: Callable[[], object]) -> int:
    return count_launches(call).total


def moved(call: Callable[[], object]) -> int:
    """Return the passes of a call over tensors of all tokens and the width of the block."""
    with MovedValues() as counter:
        call()
    passes, rest = divmod(counter.values, ROWS * WIDTH)
    assert rest == 0
    return passes


def plus(one: block.PerPass, other: block.PerPass) -> block.PerPass:
    return block.PerPass(one.forward + other.forward, one.backward + other.backward)


def test_weights_are_those_of_the_block() -> None:
    described = {weight.name: tuple(size * WIDTH for size in weight.shape) for weight in block.WEIGHTS}
    assert described == {name: tuple(p.shape) for name, p in Block(WIDTH, HEADS).named_parameters()}


def test_tensor_parallelism_splits_the_weights_that_are_described_as_split() -> None:
    assert {weight.name for weight in block.WEIGHTS if weight.split} == SPLITS.keys()
    for operator in LINEAR:  # the second dimension of a matrix is its input
        assert operator.splits_input == (SPLITS[f"{operator.name}.weight"].dim == 1)
        assert operator.splits_output != operator.splits_input


@pytest.mark.parametrize("tensor", [1, 2])
def test_parameters_of_a_rank(tensor: int) -> None:
    sizes = {name: p.numel() for name, p in Block(WIDTH, HEADS).named_parameters()}
    expected = sum(size // tensor if name in SPLITS else size for name, size in sizes.items())
    assert block.parameters(WIDTH, tensor) == expected
    assert block.largest_matrix(WIDTH) == max(sizes.values())


def test_macs_and_norms_are_those_that_the_counter_finds() -> None:
    with torch.device("meta"):
        module, x = Block(WIDTH, HEADS), torch.empty(CLIPS, TOKENS, WIDTH, requires_grad=True)
    counted = count_forward(module, x)
    macs = ROWS * block.token_macs(WIDTH) + CLIPS * TOKENS**2 * block.pair_macs(WIDTH)
    assert counted.macs == macs
    assert counted.layer_norm_elements == block.NUM_NORMS * ROWS * WIDTH
    # Each linear map, and each product of attention, has two gradients, of one product each.
    assert count_training_step(lambda: module(x).sum(), module).macs == 3 * macs


def test_kept_activations_are_those_that_the_memory_trace_finds() -> None:
    def inputs() -> tuple[Tensor]:
        return (torch.zeros(CLIPS, TOKENS, WIDTH),)

    trace = trace_memory(lambda: Block(WIDTH, HEADS), inputs, lambda module, x: module(x).sum())
    first = next(moment for moment in trace.timeline if moment.phase == "backward")
    tensors = block.kept(block.OPERATORS) + block.kept(block.OPERATORS, split=True)
    statistics = 2 * block.NUM_NORMS + HEADS  # mean and deviation per norm, log-sum-exp per head
    # The block's input is the step's.
    expected = 4 * ROWS * ((tensors - block.OPERATORS[0].kept) * WIDTH + statistics)
    assert first.live_bytes["activations"] == pytest.approx(expected, abs=64)


def test_launches_of_both_passes() -> None:
    assert both_passes(launched) == block.launches(block.OPERATORS)


def test_launches_of_the_parts_that_recomputation_repeats() -> None:
    module, x = Block(WIDTH, HEADS), torch.randn(CLIPS, TOKENS, WIDTH)
    for part in ("attention", "mlp"):
        found = launched(lambda part=part: getattr(module, part)(x))
        assert found == block.launches(block.repeated(part)).forward


def test_passes_over_memory() -> None:
    whole, split = (block.moves(block.OPERATORS, split=is_split) for is_split in (False, True))
    assert both_passes(moved) == plus(whole, split)


def test_drop_path_adds_launches_and_passes() -> None:
    scales = (torch.ones(CLIPS, 1, 1), torch.ones(CLIPS, 1, 1))
    for measure, added in (
        (launched, block.launches(block.DROP_PATH_OPERATORS)),
        (moved, block.moves(block.DROP_PATH_OPERATORS)),
    ):
        assert both_passes(measure, scales) == plus(both_passes(measure), added)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("fused", torch.bfloat16), ("unfused", torch.float32)]
)  # in bfloat16 on a CPU, fused attention consists of PyTorch's products, which can be counted
def test_products_within_attention(kind: str, dtype: torch.dtype) -> None:
    qkv = torch.randn(1, 8, 3, 2, 16, dtype=dtype, requires_grad=True)
    outputs: list[Tensor] = []
    forward = count_launches(lambda: outputs.append(ATTENTION[kind](qkv)))
    backward = count_launches(outputs[0].sum().backward)
    assert (forward.launches["bmm"], backward.launches["bmm"]) == block.ATTENTION_PRODUCTS[kind]
