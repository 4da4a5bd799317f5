"""Linear maps, by the faster of the libraries that PyTorch brings.

In float32 on a CPU, PyTorch multiplies with MKL, Intel's library. On AMD's processors oneDNN, which PyTorch
ships for other precisions, is 10 to 25 % faster on the shapes of a step. On Intel's, MKL is the faster one
for nearly all of them, and twice as fast for some (docs/benchmarks.md). So large products of activations go
to oneDNN unless the processor is Intel's.

Shape legend: n tokens of any clips, I inputs, O outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Multiply-accumulates from which a product gains more than the longer way through Python costs.
_WORTHWHILE_MACS = 10**8


def prefers_onednn(processors: Path = Path("/proc/cpuinfo")) -> bool:
    """Return whether oneDNN multiplies float32 faster than MKL here, as it does but on Intel's processors."""
    is_intel = processors.is_file() and "GenuineIntel" in processors.read_text()
    return torch.backends.mkldnn.is_available() and not is_intel


_PREFERS_ONEDNN = prefers_onednn()


def linear(x_nI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., I) -> (..., O)."""
    if _goes_to_onednn(x_nI, weight_OI) or _may_be_released(x_nI, weight_OI):
        return _Linear.apply(x_nI, weight_OI, bias_O)
    return F.linear(x_nI, weight_OI, bias_O)


def multiply(a_nI: Tensor, b_IO: Tensor) -> Tensor:
    """a @ b of two matrices, without gradient."""
    if _goes_to_onednn(a_nI, b_IO.t()):
        return _onednn(a_nI, b_IO.t(), None)
    return a_nI @ b_IO


def init_linear(module: nn.Linear) -> None:
    """Xavier-uniform weight and zero bias, as VideoMAE begins."""
    nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class XavierLinear(nn.Linear):
    """`nn.Linear` that begins as `init_linear` says."""

    def reset_parameters(self) -> None:
        """Draw the initial weights; PyTorch's constructor calls this."""
        init_linear(self)


class Linear(XavierLinear):
    """`nn.Linear` by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        return linear(input, self.weight, self.bias)


class LinearWithoutBias(XavierLinear):
    """`nn.Linear` whose bias is the caller's to give with the input."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x_nI: Tensor, bias_O: Tensor) -> Tensor:  # type: ignore[override]
        """(..., I), (O,) -> (..., O)."""
        return linear(x_nI, self.weight, bias_O)


class _Linear(torch.autograd.Function):
    """Keeps the weight itself for the backward pass, where `F.linear` keeps its transpose.

    That one would hold on to the memory of a weight that ZeRO-3 has released meanwhile, so to all of them.
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
            grad.t() @ x_nI.flatten(0, -2) if of_weight else None,  # MKL is as fast on these
            grad.sum(dim=0) if of_bias and ctx.has_bias else None,
        )


def _may_be_released(x_nI: Tensor, weight_OI: Tensor) -> bool:
    """Return whether ZeRO-3 may release the weight between the passes: it releases parameters only.

    Under autocast, what is kept for the backward pass is a copy. Without gradients, as inside another
    autograd function, nothing is kept. Blocks are not compiled under ZeRO-3, and dynamo of torch 2.11 cannot
    trace the question about autocast.
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
