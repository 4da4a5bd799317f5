"""Every ZeRO stage on the one device that is here, a GPU if there is one, against the plain loop on it.

Run by `test_nccl.py` as a process of its own: DeepSpeed settles on a kind of device when it is imported.
"""

from __future__ import annotations

import os

from everest_ds.launch.environment import detect
from everest_ds.parallel.world import join_world, leave_world
from tests.parallel.equality import STAGES, TASKS, assert_equal, engine_run, experiment, plain_run


def main() -> None:
    """Print the device and what was held equal."""
    os.environ.update(detect({}).as_variables())
    world = join_world()
    for task in TASKS:
        expected = plain_run(task, world.device)
        for stage in STAGES:
            assert_equal(engine_run(world, experiment(task, stage, 1)), expected, f"{task}, ZeRO-{stage}")
            print(f"{world.device}: {task}, ZeRO-{stage}: equal")
    leave_world()


if __name__ == "__main__":
    main()
