"""The step of one configuration on the real engine: phases on host and device, memory, predictions."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from everest_ds.config import Experiment
from everest_ds.costs.compute import FLOPS_PER_MAC, predict_macs
from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import Device, find_device, peak_flops_per_s
from everest_ds.costs.memory import predict_memory
from everest_ds.costs.step_time import predict_step
from everest_ds.errors import ConfigError
from everest_ds.parallel.world import World
from everest_ds.profiling.device_rates import wait
from everest_ds.profiling.step_measurement import compute_dtype, device_name
from everest_ds.training.engine_step import EngineStep
from gpu_check.cases import Case
from gpu_check.record import Record, Row
from gpu_check.trace import trace_steps

GIB = 2**30
PHASES = ("load", "forward", "backward", "update")
STEPS, WARM_UP = 8, 4
_CASE_S = 9.0  # seconds to build a ViT-L, compile its blocks and run a dozen steps on an H100's machine


class PhaseClock:
    """A clock that times phases by the host's clock and by GPU events, without making the device wait."""

    def __init__(self, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._host: list[float] = []
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """End one phase and begin the next."""
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        self._host.append(time.perf_counter())

    def host_ms(self) -> list[float]:
        """Return the milliseconds of each phase on the host."""
        return [1e3 * (end - start) for start, end in zip(self._host, self._host[1:], strict=False)]

    def device_ms(self) -> list[float]:
        """Return the milliseconds of each phase on the GPU, which must have finished."""
        return [a.elapsed_time(b) for a, b in zip(self._events, self._events[1:], strict=False)]


def measure_case(
    record: Record,
    case: Case,
    world: World,
    *,
    name: str | None = None,
    steps: int = STEPS,
    warm_up: int = WARM_UP,
) -> Row:
    """Measure a case and add its row to the record, under `name` or the case's own name."""
    session = record.session
    trace = None if case.trace is None else session.out / case.trace

    def measure() -> Row:
        return measure_step(case.config(session.tiny), world, trace=trace, steps=steps, warm_up=warm_up)

    return record.measure(name or case.name, measure, needs_s=_CASE_S)


def measure_step(
    config: Experiment,
    world: World,
    *,
    trace: Path | None = None,
    steps: int = STEPS,
    warm_up: int = WARM_UP,
) -> Row:
    """Build the engine, train it on noise clips and return the figures of a step.

    Args:
        config: a config with one micro-batch per step.
        world: the ranks of the run.
        trace: file for a trace of two further steps, whose kernels become the row's `profile`.
        steps: number of measured steps.
        warm_up: steps before the measured ones; the first of them compiles.
    """
    row: Row = {
        "task": config.task,
        "backbone": config.model.backbone,
        "clips": config.batch.micro_batch_size,
    }
    started = time.perf_counter()
    with EngineStep(config, world) as step:
        wait(world.device)
        row["build_s"] = time.perf_counter() - started
        started = time.perf_counter()
        first = one_step(step, PhaseClock(False))
        wait(world.device)
        row["first_step_s"] = time.perf_counter() - started
        for _ in range(warm_up - 1):
            one_step(step, PhaseClock(False))
        wait(world.device)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # the peak must not include building the engine
        clocks = [PhaseClock(world.device.type == "cuda") for _ in range(steps)]
        started = time.perf_counter()
        for clock in clocks:
            last = one_step(step, clock)
        wait(world.device)
        row |= _times((time.perf_counter() - started) / steps, clocks, config, world.device)
        row |= _memory(config, world.device)
        row["finite_loss"] = math.isfinite(float(first)) and math.isfinite(float(last))
        if trace is not None:
            row["profile"] = trace_steps(lambda: one_step(step, PhaseClock(False)), world.device, trace)
    product = find_device(device_name(world.device))
    prediction = None if product is None else predict(config, product)
    return row | {"predicted_ms": prediction and prediction.ms}


def one_step(step: EngineStep, clock: PhaseClock) -> torch.Tensor:
    """Run load, forward, backward and update, and return the loss without waiting for it."""
    clock.mark()
    batch = step.load()
    clock.mark()
    loss = step.forward(batch)
    clock.mark()
    step.backward(loss)
    clock.mark()
    step.update()
    clock.mark()
    return loss.detach()


def _times(step_s: float, clocks: list[PhaseClock], config: Experiment, device: torch.device) -> Row:
    clips = config.batch.micro_batch_size
    flops = FLOPS_PER_MAC * predict_macs(config).training_macs * clips
    row: Row = {
        "step_ms": 1e3 * step_s,
        "clips_per_s": clips / step_s,
        "tflop_per_s": 1e-12 * flops / step_s,
        "mfu_pct": mfu_pct(config, step_s, device),
        "host_ms": _medians(clock.host_ms() for clock in clocks),
    }
    if device.type == "cuda":
        row["device_ms"] = _medians(clock.device_ms() for clock in clocks)
    return row


def _medians(of_steps: Iterator[list[float]]) -> dict[str, float]:
    columns = zip(*of_steps, strict=True)
    return {phase: statistics.median(column) for phase, column in zip(PHASES, columns, strict=True)}


def mfu_pct(config: Experiment, step_s: float, device: torch.device) -> float | None:
    """Return the share of the device's peak in the config's precision; None if the peak is unknown."""
    peak = peak_flops_per_s(device_name(device), compute_dtype(config.precision, device))
    flops = FLOPS_PER_MAC * predict_macs(config).training_macs * config.batch.micro_batch_size
    return None if peak is None else 100 * flops / step_s / peak


def _memory(config: Experiment, device: torch.device) -> Row:
    """Return the peak of the allocator and its prediction, GiB."""
    predicted = predict_memory(config, 1).peak_bytes / GIB
    if device.type != "cuda":
        return {"predicted_gib": predicted}
    peak, reserved = torch.cuda.max_memory_allocated() / GIB, torch.cuda.memory_reserved() / GIB
    error = 100 * (predicted / peak - 1)
    return {"peak_gib": peak, "reserved_gib": reserved, "predicted_gib": predicted, "memory_error_pct": error}


class Prediction(NamedTuple):
    """A predicted step without decoding: milliseconds, and the MFU if the peak rate is known."""

    ms: float
    mfu_pct: float | None


def predict(config: Experiment, device: Device) -> Prediction | None:
    """Predict a step with the tuner's model and a data sheet; return None if that is impossible."""
    try:
        step = predict_step(config, 1, machine_from_sheet("one device", device))
    except ConfigError:
        return None
    seconds = step.step_s - step.term("data").seconds
    peak = step.peak_flops_per_s
    return Prediction(1e3 * seconds, None if peak is None else 100 * step.useful_flops / seconds / peak)
