"""Softmax attention over the tokens of a clip, with a kernel chosen for the device and precision.

Shape legend: B clips, h heads, n tokens, d width of one head, H = B·h.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.config.backbones import logits_per_chunk


def fused_attention(qkv_Bn3hd: Tensor) -> Tensor:
    """Compute softmax(QKᵀ/√d)V without keeping an n x n matrix for the backward pass.

    Uses PyTorch's fused kernels except in bfloat16 on a CPU: there they compute in float32 and are 2 to 4
    times slower than oneDNN's bfloat16 products at the few hundred tokens that a clip keeps
    (docs/benchmarks.md).

    Returns:
        (B, n, h·d).
    """
    if qkv_Bn3hd.device.type == "cpu" and qkv_Bn3hd.dtype == torch.bfloat16:
        return _ChunkedAttention.apply(qkv_Bn3hd)
    # unbind costs one copy in the backward pass: it stacks the gradients of q, k and v in the order of qkv.
    q, k, v = (part.transpose(1, 2) for part in qkv_Bn3hd.unbind(2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def unfused_attention(qkv_Bn3hd: Tensor) -> Tensor:
    """Compute softmax(QKᵀ/√d)V and store both n x n matrices, as for the published memory figures."""
    values = qkv_Bn3hd[:, :, 2].transpose(1, 2)
    return (attention_weights(qkv_Bn3hd) @ values).transpose(1, 2).flatten(2)


def attention_weights(qkv_Bn3hd: Tensor) -> Tensor:
    """Return softmax(QKᵀ/√d), (B, h, n, n): the weight of each token (column) in each output token (row)."""
    q, k = qkv_Bn3hd[:, :, :2].permute(2, 0, 3, 1, 4)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)


ATTENTION: dict[str, Callable[[Tensor], Tensor]] = {"fused": fused_attention, "unfused": unfused_attention}


class _ChunkedAttention(torch.autograd.Function):
    """Attention computed for a few heads at a time, so that their logits stay in cache.

    In long clips, the logits of one head would exceed it, so its rows are also computed a few at a time. The
    backward pass recomputes the logits. Logits and weights are rounded to the precision of the inputs, as in
    unfused attention under autocast.
    """

    @staticmethod
    def forward(ctx: Any, qkv_Bn3hd: Tensor) -> Tensor:
        num_clips, n, _, heads, d = qkv_Bn3hd.shape
        qkv_3Hnd = qkv_Bn3hd.permute(2, 0, 3, 1, 4).clone(memory_format=torch.contiguous_format).flatten(1, 2)
        qkv_3Hnd[0].mul_(d**-0.5)
        ctx.save_for_backward(qkv_3Hnd)
        out_Hnd = torch.empty_like(qkv_3Hnd[0])
        for some, rows in _chunks(*qkv_3Hnd.shape[1:3]):
            q, k, v = qkv_3Hnd[:, some]
            torch.bmm((q[:, rows] @ k.transpose(1, 2)).softmax(dim=-1), v, out=out_Hnd[some, rows])
        return out_Hnd.view(num_clips, heads, n, d).transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, grad_BnD: Tensor) -> Tensor:
        (qkv_3Hnd,) = ctx.saved_tensors
        d = qkv_3Hnd.shape[-1]
        grad_Bnhd = grad_BnD.unflatten(-1, (-1, d))
        grad_Hnd = grad_Bnhd.transpose(1, 2).flatten(0, 1)
        grads_3Hnd = torch.empty_like(qkv_3Hnd)
        for some, rows in _chunks(*qkv_3Hnd.shape[1:3]):
            q, k, v = qkv_3Hnd[:, some]
            q, grad = q[:, rows], grad_Hnd[some, rows]
            is_first = rows.start == 0
            weights = (q @ k.transpose(1, 2)).softmax(dim=-1)
            _add_product(grads_3Hnd[2, some], weights.transpose(1, 2), grad, is_first)
            of_weights = grad @ v.transpose(1, 2)
            of_logits = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            torch.bmm(of_logits, k, out=grads_3Hnd[0, some, rows])
            _add_product(grads_3Hnd[1, some], of_logits.transpose(1, 2), q, is_first)
        grads_3Hnd[0].mul_(d**-0.5)
        num_clips, _, heads, _ = grad_Bnhd.shape
        return grads_3Hnd.unflatten(1, (num_clips, heads)).permute(1, 3, 0, 2, 4)


def _add_product(total: Tensor, left: Tensor, right: Tensor, is_first: bool) -> None:
    """Write a batch of matrix products to `total` if it is the first of the sum, otherwise add it."""
    if is_first:
        torch.bmm(left, right, out=total)
    else:
        torch.baddbmm(total, left, right, out=total)


def _chunks(num_heads: int, num_tokens: int) -> Iterator[tuple[slice, slice]]:
    """Yield slices over the B·h heads and over the rows of each, of `logits_per_chunk`."""
    num_at_once, num_rows = logits_per_chunk(num_tokens)
    for head, row in product(range(0, num_heads, num_at_once), range(0, num_tokens, num_rows)):
        yield slice(head, head + num_at_once), slice(row, row + num_rows)
