"""The replay part: the time for which the GPU waits for the host in a forward and a backward pass.

Both passes are launched operator by operator, as in a run, and then replayed as one CUDA graph, which needs
no work of the host. The shapes do not depend on the clips, so a captured step serves all clips. The model is
that of a run without DeepSpeed, because its hooks run on the host and cannot be captured.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from everest_ds.config import Experiment
from everest_ds.parallel.compile import apply_compile
from everest_ds.parallel.world import World
from everest_ds.parallel.world_of_one import world_of_one
from everest_ds.profiling.device_rates import wait
from everest_ds.training.plain_step import PlainStep
from gpu_check.cases import Case
from gpu_check.record import Record, Row

CASES = (
    Case("pretrain", "vit_large", 64),
    Case("finetune", "vit_large", 16),
    Case("pretrain", "vit_base", 64),
    Case("finetune", "vit_base", 32),
    Case("pretrain", "vit_small", 64),
)
_ROUNDS, _WARM_UP = 10, 3
_CASE_S = 8.0


def run(record: Record) -> None:
    """Measure all cases with eager and with compiled blocks."""
    tiny = record.session.tiny
    with world_of_one() as world:
        for case in CASES:
            for compiled in (False,) if tiny else (False, True):
                overrides = (*case.overrides, f"model.compile={str(compiled).lower()}")
                config = case._replace(overrides=overrides).config(tiny)
                name = f"{case.name}, {'compiled' if compiled else 'eager'}"
                record.measure(name, lambda: _measure(config, world), needs_s=_CASE_S)  # noqa: B023


def _measure(config: Experiment, world: World) -> Row:
    """Return milliseconds of both passes, launched and (on a GPU) replayed, and the memory of the graph."""
    step = PlainStep(config, world.device)
    apply_compile(step.model, config, world)
    batch = step.prepare(step.load())

    def passes() -> None:
        step.model.zero_grad()
        step.backward(step.loss(batch))

    row: Row = {"launched_ms": _median_ms(passes, world.device)}
    if world.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        step.model.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.backward(step.loss(batch))
        row["replayed_ms"] = _median_ms(graph.replay, world.device)
        row["graph_gib"] = (torch.cuda.memory_allocated() - before) / 2**30
    return row


def _median_ms(call: Callable[[], object], device: torch.device) -> float:
    for _ in range(_WARM_UP):
        call()
    seconds = []
    for _ in range(_ROUNDS):
        wait(device)
        started = time.perf_counter()
        call()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return 1e3 * sorted(seconds)[_ROUNDS // 2]
