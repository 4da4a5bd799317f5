"""CUDA's autocast rules applied to CPU tensors, so that the same operators run in float32 as on a GPU.

PyTorch's autocast lists differ between devices: CUDA computes softmax, norms and losses in float32, a CPU
does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

# The "CUDA Ops that can autocast to float32" (torch.amp docs) that Vision Transformers and losses use.
_IN_FLOAT32: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.softmax,
        Tensor.softmax,
        F.softmax,
        F.layer_norm,
        F.mse_loss,
        F.smooth_l1_loss,
        F.cross_entropy,
        torch.sum,
        Tensor.sum,
        torch.pow,
        Tensor.pow,
        torch.norm,
        Tensor.norm,
    }
)


@contextmanager
def cuda_autocast(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast the enclosed operators to `dtype` by CUDA's rules; None disables autocast."""
    if dtype is None:
        yield
        return
    with torch.autocast("cpu", dtype), _Float32Operators():
        yield


class _Float32Operators(TorchFunctionMode):
    """A function mode that converts the inputs of `_IN_FLOAT32` operators to float32."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _IN_FLOAT32:
            inputs = (args, kwargs)
            args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, inputs)
        return func(*args, **kwargs)
