"""Worker processes that read ahead, and what to do when a video kills or hangs one of them.

A rank's loader has no state of its own: which samples come when is a pure function of the step
(`order.training_visits`), so a resumed run starts it where it stopped, on any number of ranks and workers,
and nothing before that is decoded. Every batch is delivered once and in order, or an error is raised: only a
time-out of torch's loader and a lost worker are waited out.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, default_collate

from everest_ds.config import BATCHES_AHEAD, DataConfig
from everest_ds.data.loader_errors import (
    Failed,
    blames_video,
    crash_reason,
    explain_death,
    explain_silence,
    explain_torch,
    failed_item,
    failed_join,
)
from everest_ds.data.reading import Failure, SampleReader
from everest_ds.errors import DataError
from everest_ds.log import logger

T = TypeVar("T")

_POLL_S = 5.0  # how soon a dead or stuck worker is noticed
_DEATH_S = 30.0  # for a worker whose connection broke: it may still be writing a core dump
_CRASHES = 2  # of one video until it counts as broken: the first may have been an accident
_TIMED_OUT = "DataLoader timed out"  # how torch's RuntimeError begins when nothing came for `timeout`


class Loaded(NamedTuple):
    """What came of reading an item, or of a batch of items.

    Attributes:
        clips: single clips; of a batch, one stack of them.
        failures: samples that could not be read on the way.
    """

    clips: Any
    failures: list[Failure]


class Source(Protocol):
    """A data set whose items are read by a `SampleReader`."""

    reader: SampleReader

    def __getitem__(self, item: Any) -> Loaded: ...

    def name_of(self, item: Any) -> str: ...


def load(
    source: Source,
    batches: Iterator[list[T]],
    data: DataConfig,
    pin_memory: bool,
    on_failure: Callable[[Failure], None],
) -> Iterator[Any]:
    """The batches, in order, read ahead by `data.num_workers` processes (0: by this one).

    A worker that dies or takes longer than `data.read_timeout_s` for one video is replaced, and its video
    tried once more; then the video counts as unreadable, as one that a decoder refuses.

    Args:
        source: gives the clips of an item.
        batches: items of each batch; taken from only as far as is read ahead.
        on_failure: told of each sample that could not be read, when its batch comes.

    Raises:
        DataError: `source` raises it or fails otherwise, shared memory is full, a worker was killed from
            outside, or not all batches came.
    """
    undelivered = _Undelivered(batches)
    crashes: Counter[int] = Counter()
    while True:
        for loaded in _pass(source, undelivered, data, pin_memory):
            if isinstance(loaded, _Lost):
                _note_crash(source.reader, crashes, loaded)
                break
            if isinstance(loaded, Failed):
                loaded.reraise()
            undelivered.delivered()
            for failure in loaded.failures:
                on_failure(failure)
            yield loaded.clips
        else:
            undelivered.check_none_left()
            return


class _Lost(NamedTuple):
    """A video took a worker with it.

    No exception: its traceback would keep the old workers' queues alive, and the next would inherit them.
    """

    sample: int
    reason: str


def _note_crash(reader: SampleReader, crashes: Counter[int], lost: _Lost) -> None:
    name = reader.samples[lost.sample].name
    logger.warning("%s: %s; starting the workers anew", name, lost.reason)
    crashes[lost.sample] += 1
    if crashes[lost.sample] == _CRASHES:
        reader.given_up[lost.sample] = lost.reason


class _Undelivered:
    """An iterable of batches that begins, each time, with those that were handed out and did not come."""

    def __init__(self, batches: Iterator[list[Any]]) -> None:
        self._rest = batches
        self._handed_out: deque[list[Any]] = deque()

    def __iter__(self) -> Iterator[list[Any]]:
        yield from list(self._handed_out)
        for batch in self._rest:
            self._handed_out.append(batch)
            yield batch

    def delivered(self) -> None:
        """The first of them came."""
        self._handed_out.popleft()

    def check_none_left(self) -> None:
        """Refuse an end of the batches before the last one.

        Raises:
            DataError: batches were handed out and did not come, or were never asked for.
        """
        num_left = len(self._handed_out) + sum(1 for _ in self._rest)
        if num_left:
            raise DataError(
                "the loader's workers ended before the last batch",
                given=f"{num_left} batches did not come",
                fix="run the same command again; if it repeats, report it with this rank's log",
            )


class _Notes:
    """What each worker is reading, in memory that it shares with the rank."""

    def __init__(self, num_workers: int) -> None:
        # (process, sample + 1 or 0, since when): doubles hold whole numbers exactly up to 2^53
        table = torch.zeros(num_workers, 3, dtype=torch.float64)
        try:
            self._table = table.share_memory_()
        except RuntimeError as error:
            raise explain_torch("the loader's workers could not be started", error) from None

    def enter(self, worker: int) -> Callable[[int | None], None]:
        """Called in a worker; what it notes its sample with."""
        row = self._table[worker].numpy()
        row[0] = os.getpid()

        def note(sample: int | None) -> None:
            row[1], row[2] = 0 if sample is None else sample + 1, time.monotonic()

        return note

    def of(self, process: int) -> int | None:
        """The sample that a worker was reading when it died."""
        return next((sample for pid, sample, _ in self._reading() if pid == process), None)

    def stuck(self, timeout_s: float) -> list[tuple[int, int]]:
        """(process, sample) of every worker that has been reading one sample for longer."""
        now = time.monotonic()
        return [(pid, sample) for pid, sample, since in self._reading() if now - since > timeout_s]

    @property
    def idle(self) -> bool:
        """No worker is reading a sample."""
        return not self._reading()

    def _reading(self) -> list[tuple[int, int, float]]:
        rows = self._table.tolist()
        return [(int(pid), int(sample) - 1, since) for pid, sample, since in rows if sample]


class _Guarded:
    """Hands every error over as a value: raised inside a worker it would arrive as a traceback's text."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, item: object) -> Loaded | Failed:
        try:
            return self.source[item]
        except Exception as error:
            return failed_item(self.source.name_of(item), error)


def _pass(
    source: Source, batches: _Undelivered, data: DataConfig, pin_memory: bool
) -> Iterator[Loaded | Failed | _Lost]:
    """All batches with one set of workers, or those until one is lost."""
    notes = _Notes(data.num_workers)

    def start(worker: int) -> None:
        # A worker inherits the rank's handlers: it must neither save a checkpoint nor outlive a Ctrl-C.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        torch.set_num_threads(1)
        source.reader.watch = notes.enter(worker)

    loader: DataLoader[Any] = DataLoader(
        _Guarded(source),  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=data.num_workers,
        worker_init_fn=start,
        # Children of the rank itself: they see it die, and end. Python's own default differs by version.
        multiprocessing_context="fork" if data.num_workers else None,
        pin_memory=pin_memory,
        prefetch_factor=BATCHES_AHEAD if data.num_workers else None,
        timeout=_POLL_S if data.num_workers else 0,
    )
    crew = _Crew(notes, data.read_timeout_s)
    return crew.deliver(loader)


class _Crew:
    """The workers of one pass, and the thread that pins what they deliver."""

    def __init__(self, notes: _Notes, timeout_s: float) -> None:
        self._notes = notes
        self._timeout_s = timeout_s
        self._num_waits = 0  # time-outs in a row

    def deliver(self, loader: DataLoader[Any]) -> Iterator[Any]:
        """Yield the batches of the workers, until one worker is lost."""
        iterator = self._start(loader)
        while True:
            try:
                loaded = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                lost = self._judge(error)
            else:
                lost, self._num_waits = None, 0
                yield loaded
            if lost is not None:
                del iterator  # ends its workers
                yield lost
                return

    def _start(self, loader: DataLoader[Any]) -> Iterator[Any]:
        processes, threads = active_children(), threading.enumerate()
        handler = signal.getsignal(signal.SIGCHLD)
        try:
            iterator = iter(loader)
        except (OSError, RuntimeError) as error:
            raise explain_torch("the loader's workers could not be started", error) from None
        try:
            # torch's would raise in the middle of whatever the rank computes when a worker dies
            signal.signal(signal.SIGCHLD, handler)
        except ValueError:
            pass  # not the main thread: it has set none there
        self._workers = [child for child in active_children() if child not in processes]
        self._threads = [thread for thread in threading.enumerate() if thread not in threads]
        return iterator

    def _judge(self, error: Exception) -> _Lost | None:
        """Return the video that took a worker along; None: nothing came for a while, and nobody is to blame.

        Raises:
            DataError: for everything else, by which a batch would be missing.
        """
        timed_out = isinstance(error, RuntimeError) and str(error).startswith(_TIMED_OUT)
        if isinstance(error, (OSError, EOFError)) or (timed_out and self._pinning_ended):
            # the memory of a batch went with its worker
            wait([worker.sentinel for worker in self._workers], timeout=_DEATH_S)
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

    @property
    def _pinning_ended(self) -> bool:
        return not all(thread.is_alive() for thread in self._threads)


def _find_lost(workers: list[BaseProcess], notes: _Notes, timeout_s: float) -> _Lost | None:
    for worker in workers:
        if worker.exitcode is not None:
            sample = notes.of(worker.pid or 0)
            if sample is None or not blames_video(worker.exitcode):
                raise explain_death(worker.exitcode)
            return _Lost(sample, crash_reason(worker.exitcode))
    for process, sample in notes.stuck(timeout_s):
        os.kill(process, signal.SIGKILL)  # it may hold a lock of the decoder for ever
        return _Lost(sample, f"reading it takes longer than {timeout_s:g} s")
    return None


def _collate(items: list[Loaded | Failed]) -> Loaded | Failed:
    clips: list[Any] = []
    failures: list[Failure] = []
    for item in items:
        if isinstance(item, Failed):
            return item
        clips += item.clips
        failures += item.failures
    try:
        return Loaded(default_collate(clips), failures)
    except Exception as error:
        return failed_join(error)
