"""Predicted memory of the released systems: fp16 autocast, attention matrices in memory, no recomputation.

The formulas are closed-form and need no torch. All sizes are bytes per clip; n tokens, D width, h heads. A
block keeps for its backward pass:

    4nD   for each of the two norms: its input in float32
    2nD   for each of the two norms: its output in fp16, the input of the next linear map
    6nD   q (scaled), k and v, each in a contiguous copy for the matrix products
    4hn²  softmax in float32
    2hn²  softmax in fp16, the factor of v
    2nD   output of attention
    8nD   the hidden layer before GELU
    8nD   the hidden layer after GELU, the input of the second linear map

Plain modules keep more than this project's blocks do (costs/activation_memory.py), and autocast keeps more
than half-precision weights do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from everest_ds.config.backbones import TransformerShape
from everest_ds.config.precision import FLOAT16_BYTES, FLOAT32_BYTES

_KEPT_PER_VALUE = 2 * FLOAT32_BYTES + (2 + 3 + 1 + 4 + 4) * FLOAT16_BYTES
_KEPT_PER_LOGIT = FLOAT32_BYTES + FLOAT16_BYTES
# A frozen block's forward pass holds logits in fp16 and float32, their softmax, two copies of q, k and v, and
# smaller tensors.
_FROZEN_PER_LOGIT = FLOAT16_BYTES + 2 * FLOAT32_BYTES
_FROZEN_PER_VALUE = 20
# The backward pass of an MLP holds the gradients of its output, of GELU's output and of GELU's input.
_MLP_GRADIENTS = (1 + 4 + 4) * FLOAT16_BYTES
# The backward pass of attention holds the float32 gradients of softmax and logits, and two gradients of the
# block's width. It has already released the fp16 weights, v, attention's output, and the MLP with its norm.
_ATTENTION_PER_LOGIT = 2 * FLOAT32_BYTES - FLOAT16_BYTES
_ATTENTION_PER_VALUE = 2 * FLOAT16_BYTES - (FLOAT32_BYTES + (1 + 4 + 4 + 1 + 1) * FLOAT16_BYTES)


class AutocastStack(NamedTuple):
    """A stack of blocks of one shape that runs on `num_tokens` tokens per clip."""

    shape: TransformerShape
    num_tokens: int


def kept_bytes(stack: AutocastStack) -> int:
    """Return the bytes per clip that the stack keeps for the backward pass."""
    values, logits = _sizes(stack)
    return stack.shape.depth * (_KEPT_PER_VALUE * values + _KEPT_PER_LOGIT * logits)


def working_bytes(last: AutocastStack, frozen: Sequence[AutocastStack] = ()) -> int:
    """Return the peak of temporary bytes per clip on top of the activations that all stacks keep.

    Args:
        last: the stack whose last block starts the backward pass.
        frozen: stacks that run one after the other before the backward pass and have none of their own.
    """
    values, logits = _sizes(last)
    moments = [
        _MLP_GRADIENTS * values,
        _ATTENTION_PER_LOGIT * logits + _ATTENTION_PER_VALUE * values,
        *(_FROZEN_PER_LOGIT * _sizes(s)[1] + _FROZEN_PER_VALUE * _sizes(s)[0] for s in frozen),
    ]
    return max(moments)


def _sizes(stack: AutocastStack) -> tuple[int, int]:
    """Return n·D (values of all tokens) and h·n² (attention logits) of a stack."""
    return stack.num_tokens * stack.shape.width, stack.shape.heads * stack.num_tokens**2
