"""Measured time of the phases of a training step: data wait, forward, backward, optimiser."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TrainingStep(NamedTuple):
    """The phases of one training step, as functions that are called in order.

    Attributes:
        load: returns the next micro-batch on its device; its time counts as data wait.
        forward: maps a micro-batch to the loss.
        backward: computes the gradients of the loss.
        optimize: updates the weights and clears the gradients at the last micro-batch of a step.
        micro_batches: number of rounds of all phases in a step; the time of a phase is summed over them.
    """

    load: Callable[[], Any]
    forward: Callable[[Any], Tensor]
    backward: Callable[[Tensor], object]
    optimize: Callable[[], object]
    micro_batches: int = 1


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements, in seconds."""

    median_s: float
    quartile_1_s: float
    quartile_3_s: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Return the spread of at least two measurements."""
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(middle, low, high)


@dataclass(frozen=True)
class PhaseTimes:
    """Seconds of a training step's phases over all repeats; `step` is their sum without the data wait."""

    data_wait: Spread
    forward: Spread
    backward: Spread
    optimizer: Spread
    step: Spread


def measure_phases(step: TrainingStep, device: torch.device, *, warmup: int, repeats: int) -> PhaseTimes:
    """Time the phases of training steps, with events on a GPU and with the host's clock on a CPU.

    Args:
        step: the phases of a step.
        device: the device that runs the step.
        warmup: number of steps before the measured ones.
        repeats: number of measured steps, at least 2 so that quartiles exist.
    """
    for _ in range(warmup):
        _time_once(step, device)
    rows = [_time_once(step, device) for _ in range(repeats)]
    return PhaseTimes(*(Spread.of(column) for column in zip(*rows, strict=True)))


def _time_once(step: TrainingStep, device: torch.device) -> tuple[float, float, float, float, float]:
    """Return the seconds of data wait, forward, backward and optimiser, and the sum of the last three."""
    rounds = [_time_round(step, device) for _ in range(step.micro_batches)]
    data_wait, forward, backward, optimizer = map(sum, zip(*rounds, strict=True))
    return data_wait, forward, backward, optimizer, forward + backward + optimizer


def _time_round(step: TrainingStep, device: torch.device) -> tuple[float, float, float, float]:
    """Return the seconds of data wait, forward, backward and optimiser for one micro-batch."""
    clock = _EventClock() if device.type == "cuda" else _HostClock()
    before = time.perf_counter()
    batch = step.load()
    data_wait = time.perf_counter() - before  # host clock: the GPU has been idle since the last round
    clock.mark()
    loss = step.forward(batch)
    clock.mark()
    step.backward(loss)
    clock.mark()
    step.optimize()
    clock.mark()
    forward, backward, optimizer = clock.seconds()
    return data_wait, forward, backward, optimizer


class _HostClock:
    """A stopwatch that reads the host's clock."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        """Record the current time."""
        self._marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between consecutive marks."""
        return [end - start for start, end in zip(self._marks, self._marks[1:], strict=False)]


class _EventClock:
    """A stopwatch of CUDA events, which separate the phases without synchronising the GPU."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Enqueue an event on the GPU's current stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Wait for the last event and return the seconds between consecutive events."""
        self._marks[-1].synchronize()
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]
