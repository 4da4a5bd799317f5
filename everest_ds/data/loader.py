"""Worker processes that read ahead, and what to do when a video kills or hangs one of them.

A rank's loader has no state of its own: which samples come when is a pure function of the step
(`order.training_visits`), so a resumed run starts it where it stopped, on any number of ranks and workers,
and nothing before that is decoded.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from multiprocessing import active_children
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, default_collate

from everest_ds.config.schema import DataConfig
from everest_ds.data.reading import Failure, SampleReader
from everest_ds.errors import DataError, EverestError
from everest_ds.log import logger

T = TypeVar("T")

_BATCHES_AHEAD = 4  # per worker
_POLL_S = 5.0  # how soon a dead or stuck worker is noticed
_DEATH_S = 30.0  # for a worker whose connection broke: it may still be writing a core dump
_CRASHES = 2  # of one video until it counts as broken: the first may have been an accident


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
        DataError: what `source` raises, or a worker was killed from outside.
    """
    undelivered = _Undelivered(batches)
    crashes: Counter[int] = Counter()
    while True:
        for loaded in _pass(source, undelivered, data, pin_memory):
            if isinstance(loaded, _Lost):
                _note_crash(source.reader, crashes, loaded)
                break
            undelivered.delivered()
            for failure in loaded.failures:
                on_failure(failure)
            yield loaded.clips
        else:
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


class _Notes:
    """What each worker is reading, in memory that it shares with the rank."""

    def __init__(self, num_workers: int) -> None:
        # (process, sample + 1 or 0, since when): doubles hold whole numbers exactly up to 2^53
        self._table = torch.zeros(num_workers, 3, dtype=torch.float64).share_memory_()

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

    def _reading(self) -> list[tuple[int, int, float]]:
        rows = self._table.tolist()
        return [(int(pid), int(sample) - 1, since) for pid, sample, since in rows if sample]


class _Guarded:
    """Hands a typed error over as a value: raised inside a worker it would arrive as a traceback's text."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, item: object) -> Loaded | EverestError:
        try:
            return self.source[item]
        except EverestError as error:
            return error


def _pass(
    source: Source, batches: _Undelivered, data: DataConfig, pin_memory: bool
) -> Iterator[Loaded | _Lost]:
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
        prefetch_factor=_BATCHES_AHEAD if data.num_workers else None,
        timeout=_POLL_S if data.num_workers else 0,
    )
    for loaded in _watched(loader, notes, data.read_timeout_s) if data.num_workers else loader:
        if isinstance(loaded, EverestError):
            raise loaded
        yield loaded


def _watched(loader: DataLoader[Any], notes: _Notes, timeout_s: float) -> Iterator[Any]:
    """What the loader's workers deliver, until one of them is lost."""
    iterator, workers = _start(loader)
    while True:
        lost = None
        try:
            yield next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            broken = not isinstance(error, RuntimeError)  # a batch's memory went with its worker
            if broken:
                wait([worker.sentinel for worker in workers], timeout=_DEATH_S)
            lost = _find_lost(workers, notes, timeout_s)
            if lost is None and (broken or any(worker.exitcode is not None for worker in workers)):
                raise
            # else if none is lost, nothing came for a while, and nobody is to blame
        if lost is not None:
            del iterator  # ends its workers
            yield lost
            return


def _start(loader: DataLoader[Any]) -> tuple[Iterator[Any], list[BaseProcess]]:
    before = active_children()
    handler = signal.getsignal(signal.SIGCHLD)
    iterator = iter(loader)
    try:
        # torch's would raise in the middle of whatever the rank computes when a worker dies
        signal.signal(signal.SIGCHLD, handler)
    except ValueError:
        pass  # not the main thread: it has set none there
    return iterator, [child for child in active_children() if child not in before]


def _find_lost(workers: list[BaseProcess], notes: _Notes, timeout_s: float) -> _Lost | None:
    for worker in workers:
        if worker.exitcode:
            return _of_dead(worker, notes)
    for process, sample in notes.stuck(timeout_s):
        os.kill(process, signal.SIGKILL)  # it may hold a lock of the decoder for ever
        return _Lost(sample, f"reading it takes longer than {timeout_s:g} s")
    return None


def _of_dead(worker: BaseProcess, notes: _Notes) -> _Lost:
    code = worker.exitcode or 0
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    sample = notes.of(worker.pid or 0)
    if sample is None or code == -signal.SIGKILL:
        raise DataError(
            "a loader worker was killed",
            given=how,
            fix="if the machine ran out of memory, lower data.num_workers or batch.micro_batch_size",
        )
    return _Lost(sample, f"it crashes the video decoder ({how})")


def _collate(items: list[Loaded | EverestError]) -> Loaded | EverestError:
    clips: list[Any] = []
    failures: list[Failure] = []
    for item in items:
        if isinstance(item, EverestError):
            return item
        clips += item.clips
        failures += item.failures
    return Loaded(default_collate(clips), failures)
