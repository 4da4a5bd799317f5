"""The MLP of a block, which can recompute GELU in the backward pass instead of storing its result.

Shape legend: n tokens of all clips, D width, H = 4·D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config.backbones import MLP_RATIO
from everest_ds.models.linear import Linear, XavierLinear, linear, multiply


class MLP(nn.Module):
    """Two linear maps with a GELU between them.

    Attributes:
        recomputes_gelu: whether the backward pass recomputes GELU(x). Otherwise GELU(x) is stored in addition
            to x, and the two make up half of the activations that a block stores.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * width
        self.recomputes_gelu = False
        self.fc1 = Linear(width, hidden)
        self.fc2 = GELULinear(hidden, width)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """Apply the MLP: (B, n, D) -> (B, n, D)."""
        return self.fc2(self.fc1(x_BnD), self.recomputes_gelu)


class GELULinear(XavierLinear):
    """A linear layer applied to GELU(x)."""

    def forward(self, x_nH: Tensor, recompute: bool = False) -> Tensor:
        """Apply `gelu_linear` with this layer's weight and bias: (..., H) -> (..., D)."""
        return gelu_linear(x_nH, self.weight, self.bias, recompute)


def gelu_linear(x_nH: Tensor, weight_DH: Tensor, bias_D: Tensor | None, recompute: bool) -> Tensor:
    """Apply a linear map to GELU(x): (..., H) -> (..., D).

    Args:
        x_nH: input of GELU.
        weight_DH: weight of the linear map.
        bias_D: bias of the linear map, if any.
        recompute: compute GELU(x) again in the backward pass instead of storing it.
    """
    if recompute:
        return _GELULinear.apply(x_nH, weight_DH, bias_D)
    return linear(F.gelu(x_nH), weight_DH, bias_D)


class _GELULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nH: Tensor, weight_DH: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_nH, weight_DH)
        return linear(F.gelu(x_nH), weight_DH, bias_D)

    @staticmethod
    def backward(ctx: Any, grad_nD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x_nH, weight_DH = ctx.saved_tensors
        grad, x = grad_nD.flatten(0, -2), x_nH.flatten(0, -2)
        of_weight = grad.t() @ F.gelu(x)
        # Under autocast, the forward pass multiplied in half precision with weights that are stored in
        # float32.
        of_x = torch.ops.aten.gelu_backward(multiply(grad, weight_DH.to(grad.dtype)), x)
        return of_x.view_as(x_nH), of_weight, grad.sum(dim=0) if ctx.needs_input_grad[2] else None
