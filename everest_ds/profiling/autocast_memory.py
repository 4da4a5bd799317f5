"""Predicted memory of the released systems: fp16 autocast, attention matrices in memory, nothing recomputed.

In closed form, no torch. Bytes of one clip; n tokens, D width, h heads. What a block keeps:

    4nD   each of two norms: its input, in float32
    2nD   each norm's output in fp16, which the linear map after it reads
    6nD   q (scaled), k and v, each in a copy that can be multiplied
    4hn²  softmax in float32
    2hn²  the same in fp16, to multiply v with
    2nD   attention's result
    8nD   the hidden layer, for GELU
    8nD   GELU of it, for the second linear map

Plain modules keep more than ours (memory_blocks.py), and autocast more than weights in half precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from everest_ds.config.backbones import TransformerShape

FLOAT16_BYTES, FLOAT32_BYTES = 2, 4
_KEPT_PER_VALUE = 2 * FLOAT32_BYTES + (2 + 3 + 1 + 4 + 4) * FLOAT16_BYTES
_KEPT_PER_LOGIT = FLOAT32_BYTES + FLOAT16_BYTES
# A frozen block's forward pass: logits in fp16 and float32, and their softmax; q, k and v twice, and such.
_FROZEN_PER_LOGIT = FLOAT16_BYTES + 2 * FLOAT32_BYTES
_FROZEN_PER_VALUE = 20
# The backward pass of an MLP: gradients of its output, of GELU's output and of GELU's input.
_MLP_GRADIENTS = (1 + 4 + 4) * FLOAT16_BYTES
# That of attention: gradients of softmax and of logits in float32. Done with are the fp16 weights, v,
# attention's result, and the MLP with its norm; two gradients of the block's width are there.
_ATTENTION_PER_LOGIT = 2 * FLOAT32_BYTES - FLOAT16_BYTES
_ATTENTION_PER_VALUE = 2 * FLOAT16_BYTES - (FLOAT32_BYTES + (1 + 4 + 4 + 1 + 1) * FLOAT16_BYTES)


class Stack(NamedTuple):
    """Blocks of one shape on so many tokens of a clip."""

    shape: TransformerShape
    num_tokens: int


def kept_bytes(stack: Stack) -> int:
    """What the stack keeps of one clip for the backward pass."""
    values, logits = _sizes(stack)
    return stack.shape.depth * (_KEPT_PER_VALUE * values + _KEPT_PER_LOGIT * logits)


def working_bytes(last: Stack, frozen: Sequence[Stack] = ()) -> int:
    """The most that is added when all stacks have kept what they keep.

    Args:
        last: whose last block is the first of the backward pass.
        frozen: those that run before the backward pass without one of their own, one after the other.
    """
    values, logits = _sizes(last)
    moments = [
        _MLP_GRADIENTS * values,
        _ATTENTION_PER_LOGIT * logits + _ATTENTION_PER_VALUE * values,
        *(_FROZEN_PER_LOGIT * _sizes(s)[1] + _FROZEN_PER_VALUE * _sizes(s)[0] for s in frozen),
    ]
    return max(moments)


def _sizes(stack: Stack) -> tuple[int, int]:
    """nD and hn²."""
    return stack.num_tokens * stack.shape.width, stack.shape.heads * stack.num_tokens**2
