"""Look for trouble in the videos of a manifest before a training run does.

Every file is opened in a worker process: one that kills its decoder is a finding, not the end of the check.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import TypeVar

from everest_ds.data.decode import open_video
from everest_ds.data.manifest import Sample
from everest_ds.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_FILES_PER_WORKER = 64  # what a pool gets: after a crash, the unfinished rest of it goes one by one


@dataclass(frozen=True)
class Problem:
    """A video that cannot be used.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    path: Path
    reason: str


def check_manifest(
    samples: Sequence[Sample], *, min_frames: int, workers: int, on_progress: Callable[[int], None]
) -> list[Problem]:
    """Open every video and decode its first and last frame; the problems found, in the manifest's order.

    Args:
        samples: what to check.
        min_frames: a shorter video is a problem.
        workers: number of processes.
        on_progress: told how many files are done, after each.
    """
    paths = [sample.path for sample in samples]
    inspect = partial(find_fault, min_frames=min_frames)
    problems = []
    outcomes = map_isolated(inspect, paths, crashed="the file crashes the video decoder", workers=workers)
    for done, (path, fault) in enumerate(zip(paths, outcomes, strict=True), start=1):
        if fault:
            problems.append(Problem(path, fault))
        on_progress(done)
    return problems


def find_fault(path: Path, min_frames: int) -> str:
    """What is wrong with a video; empty if nothing is."""
    try:
        with open_video(path) as video:
            video.read([0, video.num_frames - 1])
            count = video.num_frames
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")
    return f"too short; given: {count} frames; allowed: {min_frames} or more" if count < min_frames else ""


def map_isolated(
    function: Callable[[Item], Result], items: Sequence[Item], *, crashed: Result, workers: int
) -> Iterator[Result]:
    """`function` of each item, in order, in processes; `crashed` for an item that kills its process."""
    window = workers * _FILES_PER_WORKER
    for start in range(0, len(items), window):
        part = items[start : start + window]
        with _pool(workers) as pool:
            futures: list[Future[Result]] = []
            with suppress(BrokenProcessPool):
                futures.extend(pool.submit(function, item) for item in part)
            for item, future in zip_longest(part, futures):
                try:
                    yield future.result() if future else _alone(function, item, crashed)
                except BrokenProcessPool:  # by this item or by one beside it
                    yield _alone(function, item, crashed)


def _alone(function: Callable[[Item], Result], item: Item, crashed: Result) -> Result:
    with _pool(1) as pool:
        pool.submit(bool).result()  # raises where no process can start at all: that is no fault of the item
        try:
            return pool.submit(function, item).result()
        except BrokenProcessPool:
            return crashed


def _pool(workers: int) -> ProcessPoolExecutor:
    # A fork of this process could inherit held locks. The server that is forked instead imports torch once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return ProcessPoolExecutor(workers, mp_context=context)
