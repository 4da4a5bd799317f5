"""Every ZeRO stage on the one device that is here, a GPU if there is one, against the plain loop on it.

Run by `test_equality.py` as a process of its own: DeepSpeed settles on a kind of device when it is imported.
"""

from __future__ import annotations

import os

from everest_ds.launch.environment import detect
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

# AdamW divides a gradient by its usual size, so a bias whose gradient is rounding error moves as far as any
# other. Kernels on a GPU sum in an order of their own, attention's backward pass in a new one each time.
# Another order of sums alone moves one bias by 1.5e-5 in 20 steps on a CPU (`SEED`).
ON_A_GPU = 1e-4


def main() -> None:
    """Print the device and what was compared on it."""
    os.environ.update(detect({}).as_variables())
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
