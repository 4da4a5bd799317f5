"""Tests of tracked memory, against allocations of known sizes."""

from __future__ import annotations

import mmap
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from everest_ds import host_memory as resident
from everest_ds.profiling.allocations import measure_resident_peak, track_allocations

CPU = torch.device("cpu")
MIB = 2**20
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux's /proc")


def test_peak_is_what_was_live_at_once_not_the_sum() -> None:
    def call() -> None:
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        del first
        second = torch.empty(5 * MIB, dtype=torch.uint8)
        third = torch.empty(2 * MIB, dtype=torch.uint8)
        del second, third

    tracked = track_allocations(call, CPU)
    assert tracked.peak_bytes == 7 * MIB
    assert [live // MIB for _, live in tracked.timeline] == [3, 0, 5, 7, 2, 0]
    assert tracked.peak_operator == "aten::empty"


def test_what_the_call_leaves_behind_stays_counted_and_what_was_there_before_does_not_count() -> None:
    kept = [torch.empty(4 * MIB, dtype=torch.uint8)]
    tracked = track_allocations(lambda: kept.append(torch.empty(MIB, dtype=torch.uint8)), CPU)
    assert tracked.peak_bytes == MIB
    assert tracked.timeline[-1][1] == MIB


def test_a_backward_pass_counts_saved_activations_and_the_gradient_in_flight() -> None:
    """Two exponentials each save their output (4 MiB) until their own backward pass."""
    x = torch.zeros(MIB, requires_grad=True)
    x.grad = torch.zeros_like(x)

    tracked = track_allocations(lambda: x.exp().exp().sum().backward(), CPU)
    # The peak holds both saved outputs and the gradient of the inner one; the sum's gradient is an expanded
    # scalar.
    assert tracked.peak_bytes == pytest.approx(3 * 4 * MIB, abs=1024)
    assert abs(tracked.timeline[-1][1]) < 1024  # all is released; the gradient already existed


def test_a_layer_saves_its_input_and_not_its_weight() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(3)))
    for weight in layers.parameters():
        weight.grad = torch.zeros_like(weight)
    x = torch.randn(256, 1024)  # 1 MiB
    activation, weight_gradient = 1, 4

    def step() -> None:
        layers(x).sum().backward()

    step()
    tracked = track_allocations(step, CPU)
    # At most, the peak holds the inputs of the second and third layer, the third layer's output gradient (an
    # expanded scalar made dense) and input gradient, and a weight gradient before it is accumulated.
    at_least, at_most = 2 * activation + weight_gradient, 5 * activation + weight_gradient
    assert at_least <= tracked.peak_bytes / MIB <= at_most


def touch(num_bytes: int, seconds: float = 0.0) -> None:
    """Hold new memory for some seconds, mapped from the system because a heap may reuse freed memory."""
    with mmap.mmap(-1, num_bytes) as held:
        np.frombuffer(held, dtype=np.uint8)[:] = 1
        time.sleep(seconds)


@on_linux
def test_resident_peak_sees_memory_that_was_touched_and_given_back() -> None:
    peak = measure_resident_peak(lambda: touch(64 * MIB))
    assert 63 * MIB < peak.peak_bytes - peak.start_bytes < 128 * MIB


@on_linux
def test_resident_peak_is_sampled_where_the_mark_cannot_be_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    peak = measure_resident_peak(lambda: touch(64 * MIB, seconds=0.2))
    assert peak.sampled
    assert peak.peak_bytes - peak.start_bytes > 63 * MIB
