"""Multiply-accumulates (MACs) per operator: a table from ATen's operators to formulas.

Linear maps, convolutions and attention are counted; a backward operator is counted by the products that make
up its gradients. An operator in neither table of this module, such as softmax, does uncounted arithmetic; the
counter lists it by name.

A formula receives the operator's result and its positional arguments (keyword arguments are options).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

Formula = Callable[..., int]
aten = torch.ops.aten


def macs_of(operator: OpOverload) -> Formula | None:
    """Return the MAC formula of `operator`; None if it has none."""
    return _MACS.get(operator.overloadpacket)


def computes(operator: OpOverload) -> bool:
    """Return whether `operator` does arithmetic, as opposed to viewing, creating or moving values."""
    return not (operator.is_view or operator.overloadpacket.__name__ in _MOVING)


def layer_norm_elements_of(operator: OpOverload, arguments: tuple[Any, ...]) -> int | None:
    """Return the number of input elements of a LayerNorm with gain and bias; None otherwise."""
    if operator.overloadpacket is not aten.native_layer_norm or arguments[2] is None:
        return None
    return int(arguments[0].numel())


def _product(_: Tensor, left: Tensor, right: Tensor, *__: Any) -> int:
    """Return the MACs of (..., m, k) times (..., k, n) or times a vector (k,): n per value on the left."""
    return left.numel() * (right.shape[-1] if right.dim() > 1 else 1)


def _product_added(out: Tensor, added: Tensor, left: Tensor, right: Tensor, *_: Any) -> int:
    """Return the MACs of a product that is added to another tensor."""
    return _product(out, left, right)


def _linear(_: Tensor, x: Tensor, weight_OI: Tensor, *__: Any) -> int:
    """Return the MACs of x @ weightᵀ: the number of outputs per input value."""
    return x.numel() * weight_OI.shape[0]


def _convolution(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    *_: Any,
) -> int:
    """Return the MACs of a convolution: one filter of values per output value.

    A transposed convolution uses one filter of values per input value. The weight's shape is (outputs, inputs
    per group, *kernel), or (inputs, outputs per group, *kernel) if transposed.
    """
    return (x if transposed else out).numel() * weight[0].numel()


def _convolution_backward(
    _: Any, of_out: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, *geometry: Any
) -> int:
    """Return the MACs of the requested gradients; input and weight gradient each cost one forward pass."""
    wanted = geometry[-1]
    return (wanted[0] + wanted[1]) * _convolution(of_out, x, weight, None, *geometry)


def _attention(_: Any, q: Tensor, k: Tensor, v: Tensor, *__: Any) -> int:
    """Return the MACs of QKᵀ and AV over (..., heads, tokens, width), ignoring any mask."""
    return q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(_: Any, of_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any) -> int:
    """Return the MACs of attention's gradients: one product for each factor of QKᵀ and AV.

    A fused kernel also recomputes QKᵀ to save memory. That is not counted, because it is no useful work and
    would make the count depend on the kernel.
    """
    return 2 * _attention(None, q, k, v)


_MACS: dict[OpOverloadPacket, Formula] = {
    aten.mm: _product,
    aten.bmm: _product,
    aten.mv: _product,
    aten.dot: _product,
    aten.addmm: _product_added,
    aten.baddbmm: _product_added,
    aten.addbmm: _product_added,
    aten.addmv: _product_added,
    aten._addmm_activation: _product_added,
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    aten._scaled_dot_product_fused_attention_overrideable_backward: _attention_backward,
}
if torch.backends.mkldnn.is_available():
    _MACS[torch.ops.mkldnn._linear_pointwise] = _linear

# Operators that create, copy or select values without arithmetic. Views are recognised by their schema.
_MOVING = frozenset(
    """
    arange empty empty_like empty_strided eye fill fill_ full full_like new_empty new_empty_strided new_full
    new_ones new_zeros ones ones_like scalar_tensor zero_ zeros zeros_like
    _to_copy _unsafe_view cat clone contiguous copy copy_ lift_fresh lift_fresh_copy set_ stack
    constant_pad_nd flip gather index index_put index_put_ index_select masked_fill masked_fill_ masked_select
    repeat roll scatter scatter_ select_backward slice_backward where
    _local_scalar_dense is_same_size resize_
    """.split()
)
