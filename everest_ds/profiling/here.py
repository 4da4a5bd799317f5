"""What there is to compute with on this machine, for those who have no torch to ask."""

from __future__ import annotations

import torch

from everest_ds.models.precision import has_tf32

HOST = torch.device("cpu")


def this_device() -> torch.device:
    """A GPU if there is one, else the CPU."""
    return torch.device("cuda") if torch.cuda.is_available() else HOST


def num_gpus() -> int:
    """GPUs that this process sees; 0 on a CPU."""
    return torch.cuda.device_count()


def num_threads() -> int:
    """Threads of an operator on the CPU."""
    return torch.get_num_threads()


def precisions_of(device: torch.device) -> list[str]:
    """In which it trains."""
    if device.type == "cpu":
        return ["fp32", "bf16"]
    bf16 = ["bf16"] if torch.cuda.is_bf16_supported() else []
    return ["fp32", *(["tf32"] if has_tf32(device) else []), *bf16, "fp16"]


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process has, or could have."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)
