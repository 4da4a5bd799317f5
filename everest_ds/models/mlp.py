"""The MLP of a block, which can compute GELU again in the backward pass instead of keeping its result.

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
    """Linear, GELU, Linear.

    Attributes:
        recomputes_gelu: whether the backward pass computes GELU(x) again. Otherwise it is kept beside x, and
            the two are half of what a block keeps.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = MLP_RATIO * width
        self.recomputes_gelu = False
        self.fc1 = Linear(width, hidden)
        self.fc2 = GELULinear(hidden, width)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        return self.fc2(self.fc1(x_BnD), self.recomputes_gelu)


class GELULinear(XavierLinear):
    """A linear map of GELU(x)."""

    def forward(self, x_nH: Tensor, recompute: bool = False) -> Tensor:
        """(..., H) -> (..., D); see `gelu_linear`."""
        return gelu_linear(x_nH, self.weight, self.bias, recompute)


def gelu_linear(x_nH: Tensor, weight_DH: Tensor, bias_D: Tensor | None, recompute: bool) -> Tensor:
    """A linear map of GELU(x): (..., H) -> (..., D).

    Args:
        recompute: compute GELU(x) again in the backward pass, instead of keeping it.
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
        # Under autocast the product ran in half precision, on weights kept in float32.
        of_x = torch.ops.aten.gelu_backward(multiply(grad, weight_DH.to(grad.dtype)), x)
        return of_x.view_as(x_nH), of_weight, grad.sum(dim=0) if ctx.needs_input_grad[2] else None
