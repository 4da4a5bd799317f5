"""Tests of the ranks: they find their devices, and collectives are timed without the ranks' own delays."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from everest_ds.errors import RankLostError, UsageError
from everest_ds.launch.environment import LOCALHOST, free_port
from everest_ds.parallel import self_test, world
from everest_ds.parallel.collective_timing import seconds_of
from everest_ds.parallel.world import World, claim_gpu
from tests.ranks import run_ranks

_LATE_S = 0.5


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Simulate a node with this number of GPUs, for the choice of a device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.parametrize("visible", [1], indirect=True)
def test_the_only_visible_gpu_is_every_ranks_own(visible: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [world._device(rank, 4) for rank in range(4)] == [torch.device("cuda", 0)] * 4
    monkeypatch.setenv("LOCAL_RANK", "3")
    world._tell_deepspeed_index(0)  # DeepSpeed uses LOCAL_RANK as the index of the GPU
    assert os.environ["LOCAL_RANK"] == "0" and "OMPI_COMM_WORLD_LOCAL_RANK" not in os.environ


@pytest.mark.parametrize("visible", [2], indirect=True)
def test_of_several_visible_gpus_each_rank_takes_its_own(visible: None) -> None:
    assert [world._device(rank, 2) for rank in range(2)] == [torch.device("cuda", rank) for rank in range(2)]
    with pytest.raises(UsageError, match="3 ranks were started on a node with 2 GPUs; given: local rank 2"):
        world._device(2, 3)


def test_two_ranks_on_one_gpu_are_refused() -> None:
    store = dist.TCPStore(LOCALHOST, free_port(), is_master=True, timeout=timedelta(seconds=20))
    for rank, uuid in enumerate(("GPU-a", "GPU-b", "GPU-c")):
        claim_gpu(store, uuid, rank)
    claim_gpu(store, "GPU-b", 1)
    with pytest.raises(UsageError, match="ranks 1 and 3 were given the same GPU; given: GPU-b"):
        claim_gpu(store, "GPU-b", 3)


def time_with_a_late_rank(world: World) -> tuple[float, float]:
    """Return the measured seconds of an all-reduce that rank 1 enters late, and of the whole measurement."""
    all_reduce, values = dist.all_reduce, torch.zeros(1024)

    def late(tensor: torch.Tensor, *args: Any, **more: Any) -> Any:
        if world.rank == 1 and len(tensor) == 1:
            time.sleep(_LATE_S)
        return all_reduce(tensor, *args, **more)

    dist.all_reduce = late
    started = time.perf_counter()
    seconds = seconds_of(world, lambda: all_reduce(values))
    return seconds, time.perf_counter() - started


def test_a_rank_that_comes_late_does_not_slow_the_links() -> None:
    for seconds, in_all in run_ranks(time_with_a_late_rank, 2):
        assert 0 < seconds < _LATE_S < in_all


def measure(world: World) -> float | None:
    """Return the all-reduce bandwidth of the real links."""
    return self_test.all_reduce_bytes_per_s(world)


def test_preflight_measures_the_real_links() -> None:
    (alone,) = run_ranks(measure, 1)
    pair = run_ranks(measure, 2)
    assert alone is None and pair[0] == pair[1] > 0


def check_wrong_sums(world: World) -> str:
    """Return the error for a sum that lacks the values of a rank."""
    values = torch.full((8,), 3.0)
    self_test._check_sums(world, values)
    values[5] = 2.0
    with pytest.raises(RankLostError) as error:
        self_test._check_sums(world, values)
    return str(error.value)


def test_wrong_sums_are_refused() -> None:
    assert all("an all-reduce returned a wrong sum" in text for text in run_ranks(check_wrong_sums, 2))
