"""Comparison of compiled with eager blocks for both tasks, on this machine's device.

`test_compile.py` runs this module in its own process, because DeepSpeed fixes the kind of device on import.
"""

from __future__ import annotations

import os

import pytest
import torch

from everest_ds.config import Experiment
from everest_ds.launch.environment import detect_environment
from everest_ds.parallel.world import join_world, leave_world
from tests.parallel.equality import engine_run, experiment

# (task, precision, recompute mode, relative tolerance of the losses); bf16 has 8 bits of mantissa.
CASES = [
    ("pretrain", "bf16", "none", 1e-2),
    ("finetune", "bf16", "attention", 1e-2),
    ("finetune", "fp32", "full", 1e-4),
]


def main() -> None:
    """Compare the losses, and print the device and each comparison."""
    from torch._dynamo.utils import counters  # heavy

    os.environ.update(detect_environment({}).as_variables())
    world = join_world()
    for task, precision, mode, tolerance in CASES:
        eager = experiment(task, 2, 1, recompute={"mode": mode}, precision=precision)
        model = eager.model.model_dump() | {"compile": None}  # the default, with which a GPU compiles
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
