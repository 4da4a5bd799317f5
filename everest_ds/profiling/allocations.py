"""Measured memory of one call: what torch's allocator handed out, and what the process held resident."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from everest_ds.errors import UsageError
from everest_ds.resident import peak_bytes, reset_peak, resident_bytes

_SAMPLING_PERIOD_S = 0.001


@dataclass(frozen=True)
class Allocations:
    """Memory that a call took from torch's allocator, above what was live when it started.

    Attributes:
        peak_bytes: the most that was live at once.
        timeline: (operator, live bytes after the event) of every allocation and release, in order; the
            operator is the innermost one running, "" outside of any. Empty on CUDA.
    """

    peak_bytes: int
    timeline: list[tuple[str, int]]

    @property
    def peak_operator(self) -> str:
        """The operator whose allocation reached the peak; "" if unknown."""
        return max(self.timeline, key=lambda event: event[1], default=("", 0))[0]


@dataclass(frozen=True)
class ResidentPeak:
    """Resident memory of the whole process around a call, heap and libraries included.

    Attributes:
        start_bytes: before the call.
        peak_bytes: the most during the call.
        sampled: the peak was sampled every millisecond, since the kernel's own mark could not be reset.
    """

    start_bytes: int
    peak_bytes: int
    sampled: bool


def track_allocations(call: Callable[[], object], device: torch.device) -> Allocations:
    """Run `call` once and track the allocator of `device`.

    On a CPU every event is recorded, which slows the call down: do not time it. What libraries allocate
    past torch (oneDNN's scratch, Python) is not seen. Nor is the release of memory that was allocated
    before the call: to measure a training step, let the gradients exist already.
    """
    if device.type == "cuda":
        return Allocations(_cuda_peak(call, device), [])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    timeline = _timeline(recorded.profiler.kineto_results.events())
    return Allocations(max((live for _, live in timeline), default=0), timeline)


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def _timeline(events: list[Any]) -> list[tuple[str, int]]:
    """Replay the profiler's events, keeping for each thread the stack of operators that are running."""
    running: dict[int, list[tuple[int, str]]] = {}
    timeline, live = [], 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now, stack = event.start_ns(), running.setdefault(event.start_thread_id(), [])
        while stack and stack[-1][0] < now:
            stack.pop()
        if event.name() != "[memory]":
            stack.append((now + event.duration_ns(), event.name()))
        elif event.device_type() == torch.autograd.DeviceType.CPU:
            live += event.nbytes()
            timeline.append((stack[-1][1] if stack else "", live))
    return timeline


def measure_resident_peak(call: Callable[[], object]) -> ResidentPeak:
    """Run `call` once and find the most memory that the process held resident meanwhile.

    Raises:
        UsageError: on a system without Linux' /proc.
    """
    try:
        start = resident_bytes()
    except OSError as error:
        raise UsageError("resident memory cannot be read on this system", given=str(error)) from None
    if not reset_peak():
        return ResidentPeak(start, _sample_peak(call), sampled=True)
    call()
    return ResidentPeak(start, peak_bytes(), sampled=False)


def _sample_peak(call: Callable[[], object]) -> int:
    done, seen = threading.Event(), [resident_bytes()]

    def sample() -> None:
        while not done.wait(_SAMPLING_PERIOD_S):
            seen[0] = max(seen[0], resident_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        call()
    finally:
        done.set()
        sampler.join()
    return max(seen[0], resident_bytes())
