"""Helper that runs a function on N real gloo ranks.

Ranks are forked from a server process that has imported torch and deepspeed once, so that a test with four
ranks starts in a tenth of a second instead of ten seconds.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

from everest_ds.launch.environment import LOCALHOST, RankEnvironment, free_port

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "deepspeed",
        # Modules that a rank imports while it trains; these imports take most of a small run's two seconds.
        "deepspeed.module_inject.auto_ep_layer",
        "matplotlib.pyplot",
        "torch._inductor.compile_fx",
        "torch.utils.tensorboard",
        "everest_ds.training.loop",
        "tests.ranks",
    ]
)

TIMEOUT_SECONDS = 240


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, patience_s: float = TIMEOUT_SECONDS
) -> list[Any]:
    """Call `function(world, *args)` in `num_ranks` processes and return their results in rank order.

    `function` must be importable (a module-level function). If a rank raises, the test fails with that rank's
    traceback. Collective calls time out after `patience_s` seconds.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # read by the server when it imports deepspeed
    port = free_port()
    pipes, processes = [], []
    for rank in range(num_ranks):
        here, there = _context.Pipe(duplex=False)
        place = RankEnvironment("test", rank, num_ranks, rank, num_ranks, LOCALHOST, port)
        process = _context.Process(target=_be_rank, args=(place, patience_s, there, function, args))
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        return [_receive(pipe, rank) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _receive(pipe: Connection, rank: int) -> Any:
    if not wait([pipe], TIMEOUT_SECONDS):
        raise AssertionError(f"rank {rank} gave no answer within {TIMEOUT_SECONDS} s")
    try:
        value, failure = pipe.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    if failure is not None:
        raise AssertionError(f"rank {rank} failed:\n{failure}")
    return value


def _be_rank(
    place: RankEnvironment,
    patience_s: float,
    pipe: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(place.as_variables(), CUDA_VISIBLE_DEVICES="")
    import torch

    from everest_ds.parallel.world import join_world, leave_world

    torch.set_num_threads(1)
    try:
        value, failure = function(join_world(timedelta(seconds=patience_s)), *args), None
        leave_world()
    except BaseException:
        value, failure = None, traceback.format_exc()
    pipe.send((value, failure))
    pipe.close()
    os._exit(0)  # a normal exit of the interpreter can wait for threads that serve lost ranks
