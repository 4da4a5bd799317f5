"""Precision of float32 matrix products: exact, or TF32 on tensor cores."""

from __future__ import annotations

import torch


def has_tf32(device: torch.device) -> bool:
    """Return whether a device supports TF32 products, as NVIDIA GPUs do since Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def set_matmul_precision(precision: str) -> None:
    """Let this process multiply float32 matrices in TF32 (for `tf32`) or in full float32 (for all others).

    TF32 rounds inputs to 10 bits of mantissa and accumulates in float32. It is also turned off explicitly,
    because NVIDIA's containers turn it on by default (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
