"""A map over items in worker processes that may crash or hang without affecting the other items.

Video decoders are C code that reads untrusted files. Each worker holds one item at a time, so the item that
crashes or hangs its worker is known; a new worker then replaces the lost one.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Seconds after which an item counts as hung: a check decodes a video, re-encoding decodes and encodes it.
CHECK_TIMEOUT_S = 120.0
REENCODE_TIMEOUT_S = 1800.0
_START_TIMEOUT_S = 120.0  # covers the imports of a worker on a busy machine
_READY = "ready"


@dataclass(frozen=True)
class Lost:
    """The outcome of an item whose worker crashed or hung, in place of a result.

    Attributes:
        reason: for example `crashed (SIGSEGV)` or `hung for more than 60 s`.
    """

    reason: str


@dataclass
class _Worker(Generic[Item, Result]):
    function: Callable[[Item], Result]
    index: int | None = None  # the item that the worker is processing
    deadline: float = field(default_factory=lambda: time.monotonic() + _START_TIMEOUT_S)

    def __post_init__(self) -> None:
        # A fork of this process could inherit held locks, so workers are forked from a bare server process.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["everest_ds.data.decoding.open_video"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self.function, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, index: int, item: Item, timeout_s: float) -> None:
        self.index, self.deadline = index, time.monotonic() + timeout_s
        self.pipe.send(item)

    def receive(self) -> Any:
        """Return the worker's message, or None if the worker is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None

    def end(self) -> str:
        """Stop the process if it still runs, and describe how it ended."""
        self.process.join(timeout=0 if self.process.is_alive() and time.monotonic() > self.deadline else 5)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        code = self.process.exitcode or 0
        return f"crashed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"


def map_isolated(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int, timeout_s: float
) -> Iterator[tuple[int, Result | Lost]]:
    """Yield (index of an item, its result) in order of completion; the result of a crash or hang is `Lost`.

    Args:
        function: the function to call; it and the items must be picklable. Its exceptions are raised here.
        items: the arguments of the calls.
        workers: number of processes.
        timeout_s: an item that takes longer is `Lost`, and its process is killed.

    Raises:
        ChildProcessError: if worker processes cannot be started.
    """
    pending = iter(enumerate(items))
    crew: list[_Worker[Item, Result]] = []
    try:
        crew.extend(_Worker(function) for _ in range(min(workers, len(items))))
        while crew:
            yield from _turn(crew, pending, timeout_s)
    finally:
        for worker in crew:
            worker.process.kill()
            worker.process.join()


def _turn(
    crew: list[_Worker[Item, Result]], pending: Iterator[tuple[int, Item]], timeout_s: float
) -> Iterator[tuple[int, Result | Lost]]:
    """Receive the messages of all workers that sent one, replace lost workers, and assign the next items."""
    patience = max(0.0, min(worker.deadline for worker in crew) - time.monotonic())
    heard = wait([worker.pipe for worker in crew], patience)
    for place, worker in reversed(list(enumerate(crew))):
        message = worker.receive() if worker.pipe in heard else None
        if message is None and (worker.pipe in heard or time.monotonic() >= worker.deadline):
            crew[place] = _Worker(worker.function)
            yield _lost(worker, timeout_s)
        elif message is not None:
            if worker.index is not None:
                succeeded, value = message
                if not succeeded:
                    raise value
                yield worker.index, value
            following = next(pending, None)
            if following is not None:
                worker.give(*following, timeout_s)
                continue
            worker.pipe.close()  # ends the worker's loop
            worker.process.join()
            crew.pop(place)


def _lost(worker: _Worker[Item, Result], timeout_s: float) -> tuple[int, Lost]:
    hung = worker.process.is_alive() and time.monotonic() >= worker.deadline
    how = worker.end()
    if worker.index is None:
        raise ChildProcessError(f"worker processes cannot start on this machine: a worker {how}")
    return worker.index, Lost(f"hung for more than {timeout_s:g} s" if hung else how)


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """Run the worker's loop: receive items and send back results or exceptions, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers
    pipe.send(_READY)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(item)))
        except Exception as error:  # sent to the parent, which raises it
            pipe.send((False, error))
