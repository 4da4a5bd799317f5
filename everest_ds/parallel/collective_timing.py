"""Timing of collectives over the actual ranks, the raw data for calibrating a machine's links."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from everest_ds.config.mesh_shape import MeshShape
from everest_ds.parallel.world import World

_REPEATS = 5


class CollectiveTime(NamedTuple):
    """The measured time of one collective.

    Attributes:
        name: `all_reduce`, `reduce_scatter` or `all_gather`.
        ranks: ranks per group; if the run has more ranks, several groups run at the same time.
        num_bytes: size of the whole tensor.
        seconds: duration on the slowest rank.
    """

    name: str
    ranks: int
    num_bytes: int
    seconds: float


def measure_collectives(world: World, sizes: Sequence[int]) -> list[CollectiveTime]:
    """Time the collectives of a training step, over groups of 2, 4, ... and all ranks. Call on every rank.

    Neighbouring ranks form a group, as in tensor parallelism.

    Args:
        world: the ranks of the run.
        sizes: tensor sizes in bytes.
    """
    return [row for ranks in _group_sizes(world.size) for row in _measure_group(world, ranks, sizes)]


def _group_sizes(num_ranks: int) -> list[int]:
    """Return the group sizes to measure: the powers of two that divide `num_ranks`, and `num_ranks`."""
    powers = [2**i for i in range(1, num_ranks.bit_length()) if num_ranks % 2**i == 0]
    return sorted({*powers, num_ranks} - {1})


def _measure_group(world: World, ranks: int, sizes: Sequence[int]) -> Iterator[CollectiveTime]:
    shape = MeshShape.over(world.size, tensor=ranks)
    groups = [dist.new_group(members) for members in shape.groups("tensor")]
    group = groups[shape.coordinates(world.rank).data]
    for num_bytes in sizes:
        values = torch.zeros(num_bytes // 4 // ranks * ranks, device=world.device)
        for name, call in _calls(values, values[: len(values) // ranks].clone(), group).items():
            yield CollectiveTime(name, ranks, values.numel() * 4, seconds_of(world, call))
    for each in groups:
        if each is not dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(each)


def _calls(whole: Tensor, part: Tensor, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    return {
        "all_reduce": lambda: dist.all_reduce(whole, group=group),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part, group=group),
    }


def seconds_of(world: World, call: Callable[[], object]) -> float:
    """Return the median duration of five calls of a collective, on the slowest rank. Call on every rank.

    A small all-reduce precedes each call. All ranks leave it at the same moment, so the measured time
    includes no waiting for late ranks.
    """
    meeting = torch.zeros(1, device=world.device)
    call()
    seconds = torch.empty(_REPEATS)
    for number in range(_REPEATS):
        dist.all_reduce(meeting)
        read = _start_clock(world.device)
        call()
        seconds[number] = read()
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=world.control)
    return float(seconds.median())


def _start_clock(device: torch.device) -> Callable[[], float]:
    """Start a clock and return a function that reads the elapsed seconds; on a GPU, by CUDA events."""
    if device.type != "cuda":
        started = time.perf_counter()
        return lambda: time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()

    def read() -> float:
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000

    return read
