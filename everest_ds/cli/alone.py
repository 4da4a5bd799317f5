"""A world of one process, for commands that no launcher starts."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from everest_ds.parallel.world import World

_LOOPBACK = "lo"
_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


@contextmanager
def world_of_one() -> Iterator[World]:
    """Join a world of this process alone, and leave it at the end. Once per process: DeepSpeed keeps the
    groups of the first world.

    It listens on the loopback interface only, so that it works on a machine without a network. The process's
    environment is a single rank's meanwhile, whatever launcher started it.
    """
    from everest_ds.launch.environment import detect
    from everest_ds.parallel.world import join_world, leave_world

    before = dict(os.environ)
    os.environ.update(detect({}).as_variables())
    if _LOOPBACK in (name for _, name in socket.if_nameindex()):
        os.environ.update(dict.fromkeys(_INTERFACES, _LOOPBACK))
    try:
        yield join_world()
    finally:
        leave_world()
        os.environ.clear()
        os.environ.update(before)
