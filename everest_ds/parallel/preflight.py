"""Do the ranks' devices compute the same, and do the ranks reach each other: measured before training."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from everest_ds.errors import RankLostError
from everest_ds.parallel.world import World

# Enough for a network to reach its rate, little enough to take no time: 13 ms for 64 MiB at 10 GB/s.
_CUDA_BYTES, _CPU_BYTES = 64 * 2**20, 4 * 2**20
_REPEATS = 3
_MATRIX = 2048


def all_reduce_bytes_per_s(world: World) -> float | None:
    """Bus bandwidth of an all-reduce over all ranks, the best of a few; None for one rank.

    What a link carries: 2 (n - 1) / n of the bytes for n ranks, as nccl-tests count it.

    Raises:
        RankLostError: the sum is wrong.
    """
    if world.size == 1:
        return None
    num_bytes = _CUDA_BYTES if world.device.type == "cuda" else _CPU_BYTES
    best = min(_timed_all_reduce(world, num_bytes) for _ in range(_REPEATS))
    return 2 * (world.size - 1) / world.size * num_bytes / best


def _timed_all_reduce(world: World, num_bytes: int) -> float:
    values = torch.full((num_bytes // 4,), float(world.rank + 1), device=world.device)
    _finish(world)
    started = time.perf_counter()
    dist.all_reduce(values)
    _finish(world)
    seconds = time.perf_counter() - started
    expected = world.size * (world.size + 1) / 2
    if not bool((values == expected).all()):
        raise RankLostError(
            f"rank {world.rank}: an all-reduce gives wrong sums",
            given=float(values[0]),
            allowed=expected,
            fix="have the network of this job's nodes looked at",
        )
    return seconds


def device_digest(world: World) -> str:
    """What this rank's GPU makes of a product that has one right answer in whole numbers; empty on a CPU."""
    if world.device.type != "cuda":
        return ""
    numbers = torch.arange(_MATRIX, device=world.device) % 7 - 3
    matrix = (numbers[:, None] * numbers[None, :] % 5 - 2).to(torch.float32)
    product = matrix @ matrix  # sums below 2^24: exact in fp32, in whatever order
    return f"{product.double().sum().item():.0f}/{product.double().square().sum().item():.0f}"


def _finish(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    world.barrier()
