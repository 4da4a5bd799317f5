"""Which operator costs how many multiply-accumulates (MACs): one table, from ATen's operators to formulas.

Linear maps, convolutions and attention are counted; a backward operator by the products that its gradients
are made of. An operator in neither table of this module computes something that nobody counts, such as
softmax; the counter lists it by name.

A formula gets the operator's result and its positional arguments (those by keyword are options).
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
    """The formula of `operator`; None if it has none."""
    return _MACS.get(operator.overloadpacket)


def computes(operator: OpOverload) -> bool:
    """Whether `operator` does arithmetic, rather than look at, make or move values."""
    return not (operator.is_view or operator.overloadpacket.__name__ in _MOVING)


def layer_norm_elements_of(operator: OpOverload, arguments: tuple[Any, ...]) -> int | None:
    """Input elements if `operator` is a LayerNorm with gain and bias, as fvcore weighs them; else None."""
    if operator.overloadpacket is not aten.native_layer_norm or arguments[2] is None:
        return None
    return int(arguments[0].numel())


def _product(_: Tensor, left: Tensor, right: Tensor, *__: Any) -> int:
    """(..., m, k) by (..., k, n), or by a vector (k,): every value on the left meets n on the right."""
    return left.numel() * (right.shape[-1] if right.dim() > 1 else 1)


def _product_added(out: Tensor, added: Tensor, left: Tensor, right: Tensor, *_: Any) -> int:
    return _product(out, left, right)


def _linear(_: Tensor, x: Tensor, weight_OI: Tensor, *__: Any) -> int:
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
    """A weight is (outputs, inputs of its group, *kernel), or transposed (inputs, outputs of its group, ...).

    So each value of the output takes one filter of values; transposed, each value of the input gives one.
    """
    return (x if transposed else out).numel() * weight[0].numel()


def _convolution_backward(
    _: Any, of_out: Tensor, x: Tensor, weight: Tensor, bias_sizes: list[int] | None, *geometry: Any
) -> int:
    """Each gradient of two, the input's and the weight's, pairs the same values as the forward pass."""
    wanted = geometry[-1]
    return (wanted[0] + wanted[1]) * _convolution(of_out, x, weight, None, *geometry)


def _attention(_: Any, q: Tensor, k: Tensor, v: Tensor, *__: Any) -> int:
    """QKᵀ and AV over (..., heads, tokens, width), whatever a mask may spare."""
    return q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _attention_backward(_: Any, of_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *__: Any) -> int:
    """Both factors of both products need a gradient.

    A fused kernel also computes QKᵀ again. That is not counted: work that a kernel repeats to save memory is
    no use to the model, and the count would depend on the kernel.
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

# Operators that make, copy or pick values and compute none. Views are recognised by their schema.
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
