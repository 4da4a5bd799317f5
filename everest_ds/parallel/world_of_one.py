"""A process group with this process as its only rank, for commands that run without a launcher."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everest_ds.parallel.world import World


@contextmanager
def world_of_one() -> Iterator[World]:
    """Join a process group with this process as its only rank, and leave the group at the end of the block.

    A process can do this only once, because DeepSpeed keeps the groups of its first world. Within the
    block, the environment variables are those of a single rank, even if a launcher started this process.
    """
    from everest_ds.launch.environment import detect_environment
    from everest_ds.parallel.world import join_world, leave_world

    before = dict(os.environ)
    os.environ.update(detect_environment({}).as_variables())
    try:
        yield join_world()
    finally:
        leave_world()
        os.environ.clear()
        os.environ.update(before)
