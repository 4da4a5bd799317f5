"""The loader: worker processes that read ahead, and recovery when a video crashes or hangs one of them.

A rank's loader has no state of its own: the order of samples is a pure function of the step
(`order.training_visits`). A resumed run therefore starts reading at the step where it stopped, on any number
of ranks and workers, and decodes nothing before it. Every batch is delivered once and in order, or an error
is raised; the loader recovers only from a time-out of torch's loader and from a lost worker.

A worker ignores the signals that ask a run to stop: a scheduler sends them to every process of a job, and the
rank still needs its workers to complete the step. Only the rank ends a worker, at the latest by its own end.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from everest_ds.config import BATCHES_AHEAD, DataConfig
from everest_ds.data.batch_memory import BatchMemory
from everest_ds.data.clip_source import ClipSource, GuardedSource, LoadedItem
from everest_ds.data.loader_errors import (
    Failed,
    blames_video,
    crash_reason,
    describe_end,
    explain_kills,
    explain_silence,
    explain_torch,
    full_memory,
    hush_lost_rank,
)
from everest_ds.data.reading import Failure, SampleReader
from everest_ds.errors import DataError
from everest_ds.host_memory import keep_freed_memory
from everest_ds.log import logger
from everest_ds.stop_signals import end_with_parent, ignore_stop_signals

T = TypeVar("T")

_POLL_S = 5.0  # longest delay before a dead or stuck worker is noticed
_DEATH_S = 30.0  # time for a worker whose connection broke to exit: it may still be writing a core dump
_KEPT_BYTES = 2**27  # of freed memory in a worker: the pictures of a clip of 1080p take 100 MB
_CRASHES = 2  # crashes until a video counts as broken: a single crash may have had another cause
_KILLS = 2  # workers killed from outside, without a batch in between, until the rank gives up
_TIMED_OUT = "DataLoader timed out"  # beginning of torch's RuntimeError when no batch came within `timeout`


def load(
    source: ClipSource,
    batches: Iterator[list[T]],
    data: DataConfig,
    pin_memory: bool,
    on_failure: Callable[[Failure], None],
) -> Iterator[Any]:
    """Yield the batches in order, read ahead by `data.num_workers` processes (0: by this process).

    If a worker dies, or takes longer than `data.read_timeout_s` for one video, the workers are restarted and
    the video is tried once more; then it counts as unreadable, like a video that its decoder refuses. If a
    worker is killed from outside, no video is blamed.

    Args:
        source: the data set, which reads the clips of an item.
        batches: items of each batch; consumed only as far as the workers read ahead.
        data: the data config.
        pin_memory: deliver the batches in pinned memory.
        on_failure: called for each sample that could not be read, when its batch is delivered.

    Raises:
        DataError: if `source` fails, shared memory is full, workers are killed from outside again and again,
            or some batches were not delivered.
    """
    undelivered = _Undelivered(batches)
    losses = _Losses(source.reader)
    while True:
        for loaded in _pass(source, undelivered, data, pin_memory):
            if isinstance(loaded, _Lost):
                losses.note(loaded)
                break
            if isinstance(loaded, Failed):
                loaded.reraise()
            undelivered.delivered()
            losses.kills = 0
            for failure in loaded.failures:
                on_failure(failure)
            yield loaded.clips
        else:
            undelivered.check_none_left()
            return


class _Lost(NamedTuple):
    """A worker that crashed, hung or was killed.

    This is a value and not an exception, because a traceback would keep the old workers' queues alive and the
    new workers would inherit them.

    Attributes:
        sample: the sample that the worker was reading, or None if no sample is to blame.
        reason: what happened.
    """

    sample: int | None
    reason: str


class _Losses:
    """The count of lost workers, by which a video is given up, or the whole run.

    Attributes:
        kills: workers killed from outside since the last batch.
    """

    def __init__(self, reader: SampleReader) -> None:
        self.kills = 0
        self._reader = reader
        self._crashes: Counter[int] = Counter()

    def note(self, lost: _Lost) -> None:
        """Count a lost worker, after which the workers are restarted.

        Raises:
            DataError: if workers are killed again before they deliver a batch.
        """
        if lost.sample is None:
            self.kills += 1
            if self.kills == _KILLS:
                raise explain_kills(lost.reason)
            logger.warning("a loader worker was killed (%s); restarting the workers", lost.reason)
            return
        name = self._reader.samples[lost.sample].name
        logger.warning("%s: %s; restarting the workers", name, lost.reason)
        self._crashes[lost.sample] += 1
        if self._crashes[lost.sample] == _CRASHES:
            self._reader.given_up[lost.sample] = lost.reason


class _Undelivered:
    """An iterable of batches; every iteration starts with those handed out earlier but not yet delivered."""

    def __init__(self, batches: Iterator[list[Any]]) -> None:
        self._rest = batches
        self._handed_out: deque[list[Any]] = deque()

    def __iter__(self) -> Iterator[list[Any]]:
        yield from list(self._handed_out)
        for batch in self._rest:
            self._handed_out.append(batch)
            yield batch

    def delivered(self) -> None:
        """Mark the oldest batch that was handed out as delivered."""
        self._handed_out.popleft()

    def check_none_left(self) -> None:
        """Raise an error if the workers ended before every batch was delivered.

        Raises:
            DataError: if some batches were handed out but not delivered, or never handed out.
        """
        num_left = len(self._handed_out) + sum(1 for _ in self._rest)
        if num_left:
            raise DataError(
                "the loader's workers ended before the last batch",
                given=f"{num_left} batches were not delivered",
                fix="run the same command again; if the error recurs, report it with this rank's log",
            )


class _Notes:
    """A record of the sample that each worker is reading, in memory shared by the rank and its workers."""

    def __init__(self, num_workers: int) -> None:
        # (process, sample + 1 or 0, start time) per worker; doubles hold integers exactly up to 2^53
        self._table = torch.zeros(num_workers, 3, dtype=torch.float64).share_memory_()

    def enter(self, worker: int) -> Callable[[int | None], None]:
        """Register the calling worker; return the function by which it notes the sample that it reads."""
        row = self._table[worker].numpy()
        row[0] = os.getpid()

        def note(sample: int | None) -> None:
            row[1], row[2] = 0 if sample is None else sample + 1, time.monotonic()

        return note

    def of(self, process: int) -> int | None:
        """Return the sample that a worker process was reading when it died, or None."""
        return next((sample for pid, sample, _ in self._reading() if pid == process), None)

    def stuck(self, timeout_s: float) -> list[tuple[int, int]]:
        """Return (process, sample) of every worker that has been reading one sample for over `timeout_s`."""
        now = time.monotonic()
        return [(pid, sample) for pid, sample, since in self._reading() if now - since > timeout_s]

    @property
    def idle(self) -> bool:
        """True while no worker is reading a sample."""
        return not self._reading()

    def _reading(self) -> list[tuple[int, int, float]]:
        rows = self._table.tolist()
        return [(int(pid), int(sample) - 1, since) for pid, sample, since in rows if sample]


def _pass(
    source: ClipSource, batches: _Undelivered, data: DataConfig, pin_memory: bool
) -> Iterator[LoadedItem | Failed | _Lost]:
    """Yield the batches from one set of workers, until they are complete or a worker is lost."""
    try:
        notes, memories = _Notes(data.num_workers), [BatchMemory() for _ in range(data.num_workers)]
    except (OSError, RuntimeError) as error:
        raise explain_torch("the loader's workers could not be started", error) from None
    guarded = GuardedSource(source)
    # Linux ends a child with the thread that forked it, and other threads may end before the loader does.
    in_main_thread = threading.current_thread() is threading.main_thread()
    end_with_rank = end_with_parent(os.getpid()) if in_main_thread else None

    def start(worker: int) -> None:
        ignore_stop_signals()
        if end_with_rank is not None:
            end_with_rank()
        hush_lost_rank()
        keep_freed_memory(_KEPT_BYTES)
        torch.set_num_threads(1)
        source.reader.watch = notes.enter(worker)
        guarded.memory = memories[worker]
        source.new_clip = guarded.memory.new_clip

    loader: DataLoader[Any] = DataLoader(
        guarded,  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=guarded.joined,
        num_workers=data.num_workers,
        worker_init_fn=start,
        # Forked workers are children of the rank itself, so they can end with it. Python's default start
        # method differs by version.
        multiprocessing_context="fork" if data.num_workers else None,
        pin_memory=pin_memory,
        prefetch_factor=BATCHES_AHEAD if data.num_workers else None,
        timeout=_POLL_S if data.num_workers else 0,
    )
    crew = _Crew(notes, memories, data.read_timeout_s)
    return crew.deliver(loader)


class _Crew:
    """The workers of one pass over the batches, and the thread that pins the batches in memory."""

    def __init__(self, notes: _Notes, memories: list[BatchMemory], timeout_s: float) -> None:
        self._notes = notes
        self._memories = memories  # batches are found in them as they arrive
        self._timeout_s = timeout_s
        self._num_waits = 0  # consecutive time-outs

    def deliver(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield the batches of the workers, until the last batch or until a worker is lost."""
        iterator = self._start(loader)
        atexit.register(self._kill)  # multiprocessing would wait for workers that ignore SIGTERM
        lost = None
        try:
            while lost is None:
                try:
                    loaded = next(iterator)
                except StopIteration:
                    return
                except Exception as error:
                    lost = self._judge(error)
                else:
                    self._num_waits = 0
                    yield loaded
        finally:
            del iterator  # asks its workers to end
            self._kill()
            atexit.unregister(self._kill)
        yield lost

    def _start(self, loader: DataLoader[Any]) -> Iterator[Any]:
        threads = threading.enumerate()
        if threading.current_thread() is threading.main_thread():
            _keep_child_handler()
        try:
            iterator = iter(loader)
        except (OSError, RuntimeError) as error:
            raise explain_torch("the loader's workers could not be started", error) from None
        # Torch has no public list of its workers, and multiprocessing forgets those that have ended already.
        self._workers: list[BaseProcess] = getattr(iterator, "_workers", [])
        self._threads = [thread for thread in threading.enumerate() if thread not in threads]
        return iterator

    def _judge(self, error: Exception) -> _Lost | None:
        """Return a lost worker's sample and the reason, or None if the loader only timed out.

        Raises:
            DataError: for any other failure, after which a batch would be missing.
        """
        timed_out = isinstance(error, RuntimeError) and str(error).startswith(_TIMED_OUT)
        if isinstance(error, (OSError, EOFError)) or (timed_out and self._pinning_ended):
            # The memory of a batch was lost with its worker, which may take a while to exit. Its sentinel is
            # closed before its exit code can be read.
            ended = wait([worker.sentinel for worker in self._workers], timeout=_DEATH_S)
            for worker in self._workers:
                if worker.sentinel in ended:
                    worker.join(_DEATH_S)
        lost = _find_lost(self._workers, self._notes, self._timeout_s)
        if lost is not None:
            return lost
        if not timed_out:
            raise explain_torch("a batch could not be handed over by the loader's workers", error) from error
        self._num_waits += 1
        silent_s = self._num_waits * _POLL_S
        if self._pinning_ended or (silent_s > self._timeout_s and self._notes.idle):
            raise explain_silence(silent_s, self._pinning_ended)
        return None

    def _kill(self) -> None:
        for worker in self._workers:
            worker.kill()

    @property
    def _pinning_ended(self) -> bool:
        return not all(thread.is_alive() for thread in self._threads)


def _keep_child_handler() -> None:
    """Keep torch's handler of SIGCHLD from raising in the middle of the rank's work when a worker dies.

    Torch sets it once per process, with its first loader. Here it is replaced before there are workers.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "") == signal_handling.__name__:  # of a loader that is not ours
        handler = signal.SIG_DFL
    signal_handling._set_SIGCHLD_handler()  # type: ignore[no-untyped-call,unused-ignore]
    signal.signal(signal.SIGCHLD, handler)


def _find_lost(workers: list[BaseProcess], notes: _Notes, timeout_s: float) -> _Lost | None:
    for worker in workers:
        if worker.exitcode is not None:
            if (full := full_memory(worker.exitcode)) is not None:
                raise full
            sample = notes.of(worker.pid or 0)
            if sample is None or not blames_video(worker.exitcode):
                return _Lost(None, describe_end(worker.exitcode))
            return _Lost(sample, crash_reason(worker.exitcode))
    for process, sample in notes.stuck(timeout_s):
        os.kill(process, signal.SIGKILL)  # the worker may be blocked in the decoder for ever
        return _Lost(sample, f"reading it takes longer than {timeout_s:g} s")
    return None
