"""Tests of CUDA's autocast rules on a CPU: operators in float32 and operators in half precision."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.profiling.autocast import cuda_autocast

# The expected dtypes follow the lists of "CUDA Ops that can autocast" in PyTorch's torch.amp documentation.
OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype]] = {
    "linear": (lambda x: F.linear(x, x), torch.float16),
    "matmul": (lambda x: x @ x, torch.float16),
    "softmax": (lambda x: x.half().softmax(dim=-1), torch.float32),
    "layer_norm": (lambda x: F.layer_norm(x.half(), x.shape[-1:]), torch.float32),
    "mse_loss": (lambda x: F.mse_loss(x.half(), x), torch.float32),
    "smooth_l1_loss": (lambda x: F.smooth_l1_loss(x.half(), x.half()), torch.float32),
    "cross_entropy": (lambda x: F.cross_entropy(x.half(), torch.zeros(4, dtype=torch.long)), torch.float32),
    "sum": (lambda x: x.half().sum(), torch.float32),
    "gelu, as it comes": (lambda x: F.gelu(x.half()), torch.float16),
    "add, as it comes": (lambda x: x + x.half(), torch.float32),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_have_the_precision_of_cuda(name: str) -> None:
    operator, dtype = OPERATORS[name]
    with cuda_autocast(torch.float16):
        assert operator(torch.ones(4, 4)).dtype == dtype


def test_without_a_type_nothing_changes() -> None:
    with cuda_autocast(None):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
