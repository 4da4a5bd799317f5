"""The time of a step when the next batch is prepared before the step, or during the step as in training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import repeat

import torch

from everest_ds.config import Experiment
from everest_ds.data.clip_batches import Batch
from everest_ds.parallel.world import World
from everest_ds.profiling.device_rates import wait
from everest_ds.training.engine_step import EngineStep, noise_batch
from everest_ds.training.prefetch import Prefetcher
from gpu_check.record import Row

_STEPS, _WARM_UP = 8, 4


def measure_prefetch(config: Experiment, world: World) -> Row:
    """Return the milliseconds of both kinds of step, on batches in pinned host memory as from a loader."""
    batch = noise_batch(config, torch.device("cpu"))
    if world.device.type == "cuda":
        batch = batch._replace(**{name: tensor.pin_memory() for name, tensor in batch._asdict().items()})
    with EngineStep(config, world) as step:
        in_line, beside = (_step_ms(step, repeat(batch), world.device, ahead) for ahead in (False, True))
    return {"in_line_ms": in_line, "beside_ms": beside}


def _step_ms(step: EngineStep, batches: Iterator[Batch], device: torch.device, ahead: bool) -> float:
    count = _WARM_UP + _STEPS
    prefetcher = Prefetcher(batches, count, [], lambda _: None, step.prepare, device)
    started = 0.0
    for number in range(count):
        if number == _WARM_UP:
            wait(device)
            started = time.perf_counter()
        loss = step.loss(prefetcher.take().batch)
        if ahead:
            prefetcher.fetch()
        step.backward(loss)
        step.update()
    wait(device)
    return 1e3 * (time.perf_counter() - started) / _STEPS
