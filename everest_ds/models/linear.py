"""Linear maps computed by the faster of the two CPU libraries that PyTorch ships.

In float32 on a CPU, PyTorch multiplies with MKL, Intel's library. On AMD processors oneDNN, which PyTorch
ships for other precisions, is 10 to 25 % faster at the shapes of a training step. On Intel processors MKL is
faster for nearly all shapes, and twice as fast for some (docs/benchmarks.md). Large products of activations
therefore run on oneDNN unless the processor is Intel's.

Shape legend: n tokens of all clips, I inputs, O outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# For smaller products, the extra Python overhead of calling oneDNN exceeds its gain.
_WORTHWHILE_MACS = 10**8


def prefers_onednn(processors: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether oneDNN is available and faster than MKL in float32, as on all but Intel's processors."""
    is_intel = processors.is_file() and "GenuineIntel" in processors.read_text()
    return torch.backends.mkldnn.is_available() and not is_intel


_PREFERS_ONEDNN = prefers_onednn()


def linear(x_nI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Apply a linear map as `F.linear` does, on the faster library: (..., I) -> (..., O)."""
    if _goes_to_onednn(x_nI, weight_OI) or _may_be_released(x_nI, weight_OI):
        return _Linear.apply(x_nI, weight_OI, bias_O)
    return F.linear(x_nI, weight_OI, bias_O)


def multiply(a_nI: Tensor, b_IO: Tensor) -> Tensor:
    """Multiply two matrices, without support for gradients."""
    if _goes_to_onednn(a_nI, b_IO.t()):
        return _onednn(a_nI, b_IO.t(), None)
    return a_nI @ b_IO


def init_linear(module: nn.Linear) -> None:
    """Set a Xavier-uniform weight and a zero bias, as VideoMAE does."""
    nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class XavierLinear(nn.Linear):
    """An `nn.Linear` that is initialised by `init_linear`."""

    def reset_parameters(self) -> None:
        """Draw the initial weights; PyTorch's constructor calls this."""
        init_linear(self)


class Linear(XavierLinear):
    """An `nn.Linear` that is computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply the linear map: (..., I) -> (..., O)."""
        return linear(input, self.weight, self.bias)


class LinearWithoutBias(XavierLinear):
    """An `nn.Linear` whose bias the caller passes along with the input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x_nI: Tensor, bias_O: Tensor) -> Tensor:  # type: ignore[override]
        """Apply the linear map with the given bias: (..., I), (O,) -> (..., O)."""
        return linear(x_nI, self.weight, bias_O)


class _Linear(torch.autograd.Function):
    """Linear map that saves the weight itself for the backward pass, while `F.linear` saves its transpose.

    The transpose would keep alive the memory of every weight that ZeRO-3 releases after the forward pass.
    """

    @staticmethod
    def forward(ctx: Any, x_nI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_nI, weight_OI if ctx.needs_input_grad[0] else None)
        ctx.has_bias = bias_O is not None
        if _goes_to_onednn(x_nI, weight_OI):
            return _onednn(x_nI, weight_OI, bias_O)
        return F.linear(x_nI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx: Any, grad_nO: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_nI, weight_OI = ctx.saved_tensors
        of_input, of_weight, of_bias = ctx.needs_input_grad
        grad = grad_nO.flatten(0, -2)
        return (
            multiply(grad, weight_OI).view_as(x_nI) if of_input else None,
            grad.t() @ x_nI.flatten(0, -2) if of_weight else None,  # MKL is as fast as oneDNN at these shapes
            grad.sum(dim=0) if of_bias and ctx.has_bias else None,
        )


def _may_be_released(x_nI: Tensor, weight_OI: Tensor) -> bool:
    """Return whether ZeRO-3 may release the weight between the forward and the backward pass.

    ZeRO-3 releases parameters only. Under autocast, a copy of the weight is saved for the backward pass;
    without gradients, as inside another autograd function, nothing is saved. Blocks are not compiled under
    ZeRO-3, and dynamo of torch 2.11 cannot trace `is_autocast_available`.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    kind = x_nI.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return weight_OI.is_leaf and weight_OI.requires_grad and not autocast


def _goes_to_onednn(x_nI: Tensor, weight_OI: Tensor) -> bool:
    return (
        x_nI.device.type == "cpu"
        and x_nI.dtype == weight_OI.dtype == torch.float32
        and _PREFERS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
        and x_nI.numel() * weight_OI.shape[0] >= _WORTHWHILE_MACS
    )


def _onednn(x_nI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x_nI, weight_OI, bias_O, "none", [], "")
