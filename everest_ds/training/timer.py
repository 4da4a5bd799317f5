"""Where the time of training steps goes: waiting for data, or anything else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

T = TypeVar("T")


class StepTimer:
    """Clock of the steps between two reports.

    A GPU computes after the host has gone on, so no single step is timed: the clock runs from `restart` to
    the report that reads `seconds` after it has waited for the last loss. What is no step is left out by
    `paused`.

    Attributes:
        steps: since `restart`.
        waited: seconds in which the host waited for data, of those steps.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.restart()

    def restart(self) -> None:
        """Begin a new interval. The device has nothing left to do."""
        self.steps, self.waited, self._paused = 0, 0.0, 0.0
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Time of the steps since `restart`. Read it when the device has finished them."""
        return time.perf_counter() - self._started - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is no step, such as validation; begins when the device has finished its steps."""
        self._finish()
        started = time.perf_counter()
        try:
            yield
        finally:
            self._finish()
            self._paused += time.perf_counter() - started

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Waited(Generic[T]):
    """An iterator that books the time until its next item as waiting."""

    def __init__(self, items: Iterator[T], timer: StepTimer) -> None:
        self._items = items
        self._timer = timer

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        started = time.perf_counter()
        item = next(self._items)
        self._timer.waited += time.perf_counter() - started
        return item
