"""Comparison of every ZeRO stage with the plain loop, on one GPU, or on the CPU of a machine without a GPU.

`test_equality.py` runs this module in its own process, because DeepSpeed fixes the kind of device on import.
"""

from __future__ import annotations

import os

from everest_ds.launch.environment import detect_environment
from everest_ds.parallel.world import join_world, leave_world
from tests.parallel.equality import (
    MICRO_BATCHES,
    STAGES,
    TASKS,
    assert_equal,
    engine_run,
    experiment,
    plain_run,
)

# AdamW normalises gradients, so a bias whose gradient is pure rounding error moves as far as any other.
# Kernels on a GPU sum in another order, and attention's backward pass in a new order each time. On a CPU,
# another order of summation alone moves one bias by 1.5e-5 in 20 steps (`SEED`).
ON_A_GPU = 1e-4


def main() -> None:
    """Compare the weights, and print the device and each comparison."""
    os.environ.update(detect_environment({}).as_variables())
    world = join_world()
    for task in TASKS:
        expected = plain_run(task, world.device, MICRO_BATCHES)
        for stage in STAGES:
            run = engine_run(world, experiment(task, stage, 1))
            assert_equal(run, expected, f"{task}, ZeRO-{stage}", ON_A_GPU)
            print(f"{world.device}: {task}, ZeRO-{stage}: equal")
    leave_world()


if __name__ == "__main__":
    main()
