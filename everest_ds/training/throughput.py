"""The speed of a run: the time of its steps, the time spent waiting for data, FLOP/s and peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from everest_ds.config.schema import Experiment
from everest_ds.costs.compute import FLOPS_PER_MAC, predict_macs
from everest_ds.costs.hardware.gpus import peak_flops_per_s
from everest_ds.host_memory import peak_bytes, reset_peak
from everest_ds.profiling.step_measurement import compute_dtype, device_name

T = TypeVar("T")


class StepTimer:
    """A clock for the steps between two reports.

    A GPU computes asynchronously, so no single step is timed. The clock runs from `restart` to the report,
    which reads `seconds` after waiting for the last loss. Time within `paused` does not count.

    Attributes:
        steps: number of steps since `restart`.
        waited: seconds of those steps in which the host waited for data.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Start a new interval. Call this when the device is idle."""
        self.steps, self.waited, self._paused = 0, 0.0, 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """The seconds spent on steps since `restart`; valid when the device has finished them."""
        return time.perf_counter() - self._started - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time within this context, such as a validation, from the time of the steps.

        The context begins and ends when the device has finished its work.
        """
        self._finish()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._finish()
            self._paused += time.perf_counter() - started

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time within this context as waiting for data."""
        started = time.perf_counter()
        yield
        self.waited += time.perf_counter() - started

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Waited(Generic[T]):
    """An iterator that adds the time until its next item to the timer's `waited`."""

    def __init__(self, items: Iterator[T], timer: StepTimer) -> None:
        self._items = items
        self._timer = timer

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        with self._timer.waiting():
            return next(self._items)


@dataclass(frozen=True)
class ClipCost:
    """The compute cost of a clip and the peak rate of a device.

    Attributes:
        flops: useful floating-point operations per clip in a training step: the masked model's forward and
            backward pass, without the work that recomputation repeats.
        peak_flops_per_s: peak rate of one rank's device in the run's precision; None if unknown.
    """

    flops: int
    peak_flops_per_s: float | None

    def tflops_per_s(self, clips_per_s: float, num_ranks: int) -> float:
        """Return the useful TFLOP/s per rank, given the clips per second of all ranks."""
        return self.flops * clips_per_s / num_ranks / 1e12

    def mfu_pct(self, clips_per_s: float, num_ranks: int) -> float | None:
        """Return the model FLOPs utilisation in percent of the peak rate; None for an unknown device."""
        if self.peak_flops_per_s is None:
            return None
        return 100 * self.tflops_per_s(clips_per_s, num_ranks) * 1e12 / self.peak_flops_per_s


def clip_cost(config: Experiment, device: torch.device) -> ClipCost:
    """Return the compute cost of a clip of a run, and the peak rate of `device` in the run's precision."""
    peak = peak_flops_per_s(device_name(device), compute_dtype(config.precision, device))
    return ClipCost(FLOPS_PER_MAC * predict_macs(config).training_macs, peak)


def take_peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory since the last call: allocated on a GPU, resident in host memory on a CPU."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak
    peak = peak_bytes()
    reset_peak()
    return peak
