"""Checks before training: the ranks reach each other, and their devices compute the same results."""

from __future__ import annotations

import torch
import torch.distributed as dist

from everest_ds.errors import RankLostError
from everest_ds.parallel.collective_timing import seconds_of
from everest_ds.parallel.world import World

# Large enough for links to reach their full rate: a call takes 0.5 to 1 ms within a node, 54 ms at 10 GB/s.
_CUDA_BYTES, _CPU_BYTES = 256 * 2**20, 4 * 2**20
_MATRIX = 2048


def all_reduce_bytes_per_s(world: World) -> float | None:
    """Measure the bus bandwidth of an all-reduce over all ranks, in bytes per second; None for one rank.

    By the convention of nccl-tests, a link carries 2 (n - 1) / n times the tensor's bytes for n ranks.

    Raises:
        RankLostError: if the all-reduce returns a wrong sum.
    """
    if world.size == 1:
        return None
    num_bytes = _CUDA_BYTES if world.device.type == "cuda" else _CPU_BYTES
    values = torch.full((num_bytes // 4,), float(world.rank + 1), device=world.device)
    dist.all_reduce(values)
    _check_sums(world, values)
    values.zero_()  # repeated sums of sums would overflow
    seconds = seconds_of(world, lambda: dist.all_reduce(values))
    return 2 * (world.size - 1) / world.size * num_bytes / seconds


def _check_sums(world: World, values: torch.Tensor) -> None:
    expected = world.size * (world.size + 1) / 2
    if not bool((values == expected).all()):
        raise RankLostError(
            f"rank {world.rank}: an all-reduce returned a wrong sum",
            given=float(values[0]),
            allowed=expected,
            fix="ask the cluster's administrators to check the network between this job's nodes",
        )


def device_digest(world: World) -> str:
    """Return a digest of an exact integer matrix product on this rank's GPU; an empty string on a CPU.

    Healthy GPUs return equal digests.
    """
    if world.device.type != "cuda":
        return ""
    numbers = torch.arange(_MATRIX, device=world.device) % 7 - 3
    matrix = (numbers[:, None] * numbers[None, :] % 5 - 2).to(torch.float32)
    product = matrix @ matrix  # sums stay below 2^24, so fp32 is exact in any order of summation
    return f"{product.double().sum().item():.0f}/{product.double().square().sum().item():.0f}"
