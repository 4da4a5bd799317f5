"""Do the ranks' devices compute the same, and do the ranks reach each other: measured before training."""

from __future__ import annotations

import torch
import torch.distributed as dist

from everest_ds.errors import RankLostError
from everest_ds.parallel.links import seconds_of
from everest_ds.parallel.world import World

# Enough for links to reach their rate: 0.5 to 1 ms within a node, 54 ms at 10 GB/s.
_CUDA_BYTES, _CPU_BYTES = 256 * 2**20, 4 * 2**20
_MATRIX = 2048


def all_reduce_bytes_per_s(world: World) -> float | None:
    """Bus bandwidth of an all-reduce over all ranks; None for one rank.

    What a link carries: 2 (n - 1) / n of the bytes for n ranks, as nccl-tests count it.

    Raises:
        RankLostError: the sum is wrong.
    """
    if world.size == 1:
        return None
    num_bytes = _CUDA_BYTES if world.device.type == "cuda" else _CPU_BYTES
    values = torch.full((num_bytes // 4,), float(world.rank + 1), device=world.device)
    dist.all_reduce(values)
    _check_sums(world, values)
    values.zero_()  # sums of sums would not stay finite
    seconds = seconds_of(world, lambda: dist.all_reduce(values))
    return 2 * (world.size - 1) / world.size * num_bytes / seconds


def _check_sums(world: World, values: torch.Tensor) -> None:
    expected = world.size * (world.size + 1) / 2
    if not bool((values == expected).all()):
        raise RankLostError(
            f"rank {world.rank}: an all-reduce gives wrong sums",
            given=float(values[0]),
            allowed=expected,
            fix="have the network of this job's nodes looked at",
        )


def device_digest(world: World) -> str:
    """What this rank's GPU makes of a product that has one right answer in whole numbers; empty on a CPU."""
    if world.device.type != "cuda":
        return ""
    numbers = torch.arange(_MATRIX, device=world.device) % 7 - 3
    matrix = (numbers[:, None] * numbers[None, :] % 5 - 2).to(torch.float32)
    product = matrix @ matrix  # sums below 2^24: exact in fp32, in whatever order
    return f"{product.double().sum().item():.0f}/{product.double().square().sum().item():.0f}"
