"""Rounding of float32 matrix products."""

from __future__ import annotations

import torch


def has_tf32(device: torch.device) -> bool:
    """Whether a device multiplies float32 matrices faster in TF32: NVIDIA's do since Ampere."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def set_matmul_precision(precision: str) -> None:
    """Let this process multiply float32 matrices in TF32 on tensor cores (`tf32`), or exactly (all others).

    TF32 rounds inputs to 10 bits of mantissa and adds up in float32. It is turned off as expressly as on:
    NVIDIA's containers turn it on for everything (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE).
    """
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
