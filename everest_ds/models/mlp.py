"""The MLP of a block, which keeps one hidden activation for the backward pass where the plain one keeps two.

Shape legend: n tokens of any clips, D width, H = 4·D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config.backbones import MLP_RATIO
from everest_ds.models.linear import Linear, XavierLinear, linear, multiply


class MLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * width
        self.fc1 = Linear(width, hidden)
        self.fc2 = GELULinear(hidden, width)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        return self.fc2(self.fc1(x_BnD))


class GELULinear(XavierLinear):
    """A linear map of GELU(x), whose backward pass computes GELU(x) again.

    The plain pair keeps x for the one and GELU(x) for the other, together half of what a block keeps. GELU
    costs well under 1 % of a step, so one of them is better made again.
    """

    def forward(self, x_nH: Tensor) -> Tensor:
        """(..., H) -> (..., D)."""
        return gelu_linear(x_nH, self.weight, self.bias)


def gelu_linear(x_nH: Tensor, weight_DH: Tensor, bias_D: Tensor | None = None) -> Tensor:
    """`GELULinear` of given weights: (..., H) -> (..., D)."""
    return _GELULinear.apply(x_nH, weight_DH, bias_D)


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
        # Under autocast the product ran in half precision, on weights kept in float32.
        of_x = torch.ops.aten.gelu_backward(multiply(grad, weight_DH.to(grad.dtype)), x)
        return of_x.view_as(x_nH), of_weight, grad.sum(dim=0) if ctx.needs_input_grad[2] else None
