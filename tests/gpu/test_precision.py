"""Tests of `precision: tf32` on a CUDA device: only with it are matrix products rounded to TF32."""

from __future__ import annotations

import pytest
import torch

from everest_ds.models.matmul_precision import has_tf32, set_matmul_precision
from tests.gpu import ON_CUDA

pytestmark = ON_CUDA


def test_only_tf32_rounds_products() -> None:
    device = torch.device("cuda")
    if not has_tf32(device):
        pytest.skip("needs tensor cores with TF32")
    a, b = torch.randn(2, 1024, 1024, dtype=torch.float64, device=device)
    error = {}
    try:
        for precision in ("tf32", "fp32"):
            set_matmul_precision(precision)
            error[precision] = float((a.float() @ b.float() - a @ b).abs().max() / (a @ b).std())
    finally:
        set_matmul_precision("fp32")
    assert error["fp32"] < 1e-5 < error["tf32"] < 1e-2
