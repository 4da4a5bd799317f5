"""Where the time of training steps goes: waiting for data, or anything else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class StepTimer:
    """Seconds spent in steps, and in waiting within them, since the last `reset`."""

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Time one optimiser step."""
        started = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - started
        self.steps += 1

    def reset(self) -> None:
        """Begin a new interval."""
        self.steps, self.seconds, self.waited = 0, 0.0, 0.0


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
