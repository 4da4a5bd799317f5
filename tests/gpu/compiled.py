"""Compiled blocks of both tasks against eager ones, on the device that is here.

Run by `test_compile.py` as a process of its own: DeepSpeed settles on a kind of device when it is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

from everest_ds.config import Experiment
from everest_ds.launch.environment import detect
from everest_ds.parallel.world import join_world, leave_world
from tests.parallel.equality import engine_run, experiment

# What to train, and how near its losses must be: bf16 has 8 bits of mantissa.
CASES = [
    ("pretrain", "bf16", "none", 1e-2),
    ("finetune", "bf16", "attention", 1e-2),
    ("finetune", "fp32", "full", 1e-4),
]


def main() -> None:
    """Print the device and what was compared on it."""
    from torch._dynamo.utils import counters  # heavy

    os.environ.update(detect({}).as_variables())
    world = join_world()
    for task, precision, mode, tolerance in CASES:
        eager = experiment(task, 2, 1, recompute={"mode": mode}, precision=precision)
        model = eager.model.model_dump() | {"compile": None}  # as it comes: a GPU compiles
        expected = engine_run(world, eager)
        torch._dynamo.reset()
        counters.clear()
        compiled = engine_run(world, Experiment.model_validate({**eager.model_dump(), "model": model}))
        assert counters["stats"]["unique_graphs"] > 0 and not counters["graph_break"]
        assert compiled.losses == pytest.approx(expected.losses, rel=tolerance)
        print(f"{world.device}: {task}, {precision}, recompute {mode}: equal")
    leave_world()


if __name__ == "__main__":
    main()
