"""Tests of time and memory measurements on a CUDA device."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

from everest_ds.profiling.allocations import track_allocations
from everest_ds.profiling.step_phases import TrainingStep, measure_phases
from tests.gpu import ON_CUDA

pytestmark = ON_CUDA
MIB = 2**20


def test_the_peak_is_what_was_allocated() -> None:
    device = torch.device("cuda")
    tracked = track_allocations(lambda: torch.empty(8 * MIB, dtype=torch.uint8, device=device), device)
    assert tracked.peak_bytes == 8 * MIB


def test_events_agree_with_the_hosts_clock() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)

    def work(products: int) -> Tensor:
        for _ in range(products):
            torch.mm(matrix, matrix)
        return matrix

    step = TrainingStep(lambda: None, lambda _: work(20), lambda _: work(40), lambda: work(1))
    measure_phases(step, device, warmup=2, repeats=2)
    start = time.perf_counter()
    times = measure_phases(step, device, warmup=0, repeats=5)
    assert 5 * times.step.median_s == pytest.approx(time.perf_counter() - start, rel=0.2)
    assert times.backward.median_s == pytest.approx(2 * times.forward.median_s, rel=0.2)
