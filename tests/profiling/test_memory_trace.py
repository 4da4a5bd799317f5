"""Tests of traced memory, against known sizes and real allocations."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from everest_ds.profiling.allocations import track_allocations
from everest_ds.profiling.memory_trace import CATEGORIES, MemoryTrace, trace_memory

WIDTH, ROWS = 256, 512
ACTIVATION, WEIGHT = ROWS * WIDTH * 4, WIDTH**2 * 4


def layers(dtype: torch.dtype = torch.float32, frozen: int = 0) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))).to(dtype)
    model[:frozen].requires_grad_(False)
    return model


def rows(dtype: torch.dtype = torch.float32) -> Sequence[Tensor]:
    return (torch.zeros(ROWS, WIDTH, dtype=dtype),)


def total(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).sum()


def in_backward(trace: MemoryTrace) -> int:
    """Return the peak of live bytes in the backward pass beyond the resting bytes."""
    moments = [moment.total_bytes for moment in trace.timeline if moment.phase == "backward"]
    return max(moments) - sum(trace.resting_bytes.values())


def test_what_rests_is_weights_gradients_two_moments_and_inputs() -> None:
    trace = trace_memory(layers, rows, total)
    steps = 3 * 4  # AdamW keeps a float32 step counter per weight
    assert trace.resting_bytes == {
        "parameters": 3 * WEIGHT,
        "master_parameters": 0,
        "gradients": 3 * WEIGHT,
        "optimizer_states": 2 * 3 * WEIGHT + steps,
        "inputs": ACTIVATION,
        "activations": 0,
        "temporary": 0,
    }


def test_half_precision_weights_have_float32_masters() -> None:
    resting = trace_memory(lambda: layers(torch.bfloat16), lambda: rows(torch.bfloat16), total).resting_bytes
    assert resting["parameters"] == resting["gradients"] == 3 * WEIGHT // 2
    assert resting["master_parameters"] == 3 * WEIGHT


def test_frozen_weights_need_neither_gradients_nor_optimiser() -> None:
    resting = trace_memory(lambda: layers(frozen=2), rows, total).resting_bytes
    assert resting["parameters"] == 3 * WEIGHT and resting["gradients"] == WEIGHT
    assert resting["optimizer_states"] == 2 * WEIGHT + 4


def test_activations_are_what_the_backward_pass_starts_from() -> None:
    """The layers keep their inputs, of which the first belongs to the step; the sum keeps nothing."""
    trace = trace_memory(layers, rows, total)
    first = next(moment for moment in trace.timeline if moment.phase == "backward")
    assert first.live_bytes["activations"] == pytest.approx(2 * ACTIVATION, abs=64)


def test_every_moment_is_booked_and_the_step_leaves_nothing() -> None:
    trace = trace_memory(layers, rows, total)
    assert [m.phase for m in trace.timeline][0] == "forward"
    assert {m.phase for m in trace.timeline} <= {"forward", "backward", "optimizer"}
    assert all(tuple(m.live_bytes) == CATEGORIES and min(m.live_bytes.values()) >= 0 for m in trace.timeline)
    assert trace.timeline[-1].live_bytes == trace.resting_bytes
    assert trace.peak_bytes == max(m.total_bytes for m in trace.timeline)


def test_a_trace_is_what_the_allocator_hands_out() -> None:
    def squares(model: nn.Module, x: Tensor) -> Tensor:
        # Squares give dense gradients. Kernels copy gradients that are not dense, which a trace cannot see.
        return model(x).square().sum()

    model, (x,) = layers(), rows()
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    measured = track_allocations(lambda: squares(model, x).backward(), torch.device("cpu")).peak_bytes
    assert in_backward(trace_memory(layers, rows, squares)) == pytest.approx(measured, abs=1024)


def test_autocast_keeps_half_the_activations_and_copies_of_the_weights() -> None:
    trace = trace_memory(layers, rows, total, amp_dtype=torch.float16)
    first = next(moment for moment in trace.timeline if moment.phase == "backward")
    # Kept in half precision are three inputs, and the weights of the two layers whose inputs need gradients.
    assert first.live_bytes["activations"] == pytest.approx(3 * ACTIVATION / 2 + 2 * WEIGHT / 2, abs=64)
