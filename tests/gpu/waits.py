"""Count of the host's waits for the device in a step of the engine, at ZeRO-1 and 2 in bf16.

`test_engine.py` runs this module in its own process, because DeepSpeed fixes the kind of device on import.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

from everest_ds.parallel.world import World
from everest_ds.parallel.world_of_one import world_of_one
from everest_ds.profiling.launches import count_launches
from everest_ds.training.engine_step import EngineStep
from tests.parallel.equality import TASKS, experiment

STAGES = (1, 2)
# Explicit waits, which PyTorch's sync debug mode does not report.
_EXPLICIT = [
    (torch.cuda, "synchronize"),
    (torch.cuda.Stream, "synchronize"),
    (torch.cuda.Event, "synchronize"),
]


def one_step(step: EngineStep) -> None:
    """Run every phase of one optimiser step."""
    for _ in range(step.micro_batches):
        step.backward(step.forward(step.load()))
        step.update()


def count_waits(call: Callable[[], object]) -> int:
    """Count the host's waits for a GPU in `call` and print their places; on a CPU, count reads of values."""
    if not torch.cuda.is_available():
        return count_launches(call).waits
    with _explicit_waits() as explicit, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    implicit = [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing" in str(w.message)]
    for place in (*implicit, *explicit):
        print(f"  a wait: {place}")
    return len(implicit) + len(explicit)


@contextmanager
def _explicit_waits() -> Iterator[list[str]]:
    found: list[str] = []
    with ExitStack() as stack:
        for owner, name in _EXPLICIT:
            stack.enter_context(patch.object(owner, name, _noting(found, getattr(owner, name))))
        yield found


def _noting(found: list[str], original: Callable[..., Any]) -> Callable[..., Any]:
    def wait(*args: Any) -> Any:
        found.append(original.__qualname__)
        return original(*args)

    return wait


def main(world: World) -> None:
    """Print the number of waits in the fourth step, for every task and stage."""
    for task in TASKS:
        for stage in STAGES:
            with EngineStep(experiment(task, stage, 1, precision="bf16"), world) as step:
                for _ in range(3):
                    one_step(step)
                waits = count_waits(partial(one_step, step))
            print(f"{world.device}: {task}, ZeRO-{stage}: waits: {waits}")


if __name__ == "__main__":
    with world_of_one() as world:
        main(world)
