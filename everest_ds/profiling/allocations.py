"""Measured memory of one call: allocations from torch's allocator, and the process's resident set."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from everest_ds.errors import UsageError
from everest_ds.host_memory import peak_bytes, reset_peak, resident_bytes

_SAMPLING_PERIOD_S = 0.001


@dataclass(frozen=True)
class Allocations:
    """Memory that a call took from torch's allocator, above what was live when the call started.

    Attributes:
        peak_bytes: peak of live bytes.
        timeline: (operator, live bytes after the event) of every allocation and release, in order; the
            operator is the innermost one running, "" outside of any operator. Empty on CUDA.
    """

    peak_bytes: int
    timeline: list[tuple[str, int]]

    @property
    def peak_operator(self) -> str:
        """Name of the operator whose allocation reached the peak; "" if unknown."""
        return max(self.timeline, key=lambda event: event[1], default=("", 0))[0]


@dataclass(frozen=True)
class ResidentPeak:
    """Resident memory of the whole process around a call, including the heap and libraries.

    Attributes:
        start_bytes: resident memory before the call.
        peak_bytes: peak resident memory during the call.
        sampled: whether the peak was sampled every millisecond, because the kernel's own high-water mark
            could not be reset.
    """

    start_bytes: int
    peak_bytes: int
    sampled: bool


def track_allocations(call: Callable[[], object], device: torch.device) -> Allocations:
    """Run `call` once and track the allocator of `device`.

    On a CPU every event is recorded, which slows the call down, so do not time it. Memory that libraries
    allocate without torch (oneDNN's scratch memory, Python objects) is not tracked, and neither is the
    release of memory that was allocated before the call: before measuring a training step, make sure that
    the gradients already exist.
    """
    if device.type == "cuda":
        return Allocations(_cuda_peak(call, device), [])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    assert recorded.profiler is not None
    timeline = _timeline(recorded.profiler.kineto_results.events())
    return Allocations(max((live for _, live in timeline), default=0), timeline)


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    """Run `call` once and return the peak of the caching allocator above its state before the call."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def _timeline(events: list[Any]) -> list[tuple[str, int]]:
    """Replay the profiler's events and keep a stack of the running operators for each thread."""
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
    """Run `call` once and return the peak resident memory of the process during the call.

    Raises:
        UsageError: the system has no Linux /proc file system.
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
    """Run `call` once and return the peak resident memory that a sampling thread sees, in bytes."""
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
