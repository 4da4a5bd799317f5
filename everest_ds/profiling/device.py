"""Queries about this machine's compute devices, for callers that do not import torch themselves."""

from __future__ import annotations

import torch

from everest_ds.models.matmul_precision import has_tf32

HOST = torch.device("cpu")


def this_device() -> torch.device:
    """Return the GPU if one is available, otherwise the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else HOST


def num_gpus() -> int:
    """Return the number of GPUs visible to this process; 0 without a GPU."""
    return torch.cuda.device_count()


def num_threads() -> int:
    """Return the number of CPU threads that torch uses within an operator."""
    return torch.get_num_threads()


def precisions_of(device: torch.device) -> list[str]:
    """Return the values of `precision` that training on `device` supports."""
    if device.type == "cpu":
        return ["fp32", "bf16"]
    bf16 = ["bf16"] if torch.cuda.is_bf16_supported() else []
    return ["fp32", *(["tf32"] if has_tf32(device) else []), *bf16, "fp16"]


def free_bytes(device: torch.device) -> int:
    """Return the GPU memory available to this process: free memory plus what torch has already reserved."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
