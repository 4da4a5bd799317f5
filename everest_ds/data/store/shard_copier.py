"""The copying of a store's shards to a node, by threads; see `staging` for the files."""

from __future__ import annotations

import fcntl
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from everest_ds.data.store.staging import ShardCopy
from everest_ds.errors import DataError
from everest_ds.log import logger

_NUM_THREADS = 4  # of a process that copies; network storage serves several streams faster than one
_BLOCK_BYTES = 1 << 22
_ATTEMPTS = 2  # to copy a shard: network storage may fail over to another path
_PAUSE_S = 0.2  # between two looks at a shard that another process copies, and before another attempt


class CopyProgress(NamedTuple):
    """The progress of staging on one node.

    Attributes:
        total_bytes: size of all shards.
        done_bytes: bytes that are in place, including those that were there before.
        copied_bytes: bytes that this process has copied.
        finished: True if all shards are in place.
    """

    total_bytes: int
    done_bytes: int
    copied_bytes: int
    finished: bool


class ShardCopier:
    """The copying of shards to this node, by threads that run within the context of this object.

    Args:
        copies: the shards and their copies.
        stall_s: seconds without progress after which copying has failed.
    """

    def __init__(self, copies: Sequence[ShardCopy], stall_s: float) -> None:
        self._waiting = deque(copies)
        self._total_bytes = sum(shard.num_bytes for shard in copies)
        self._in_place_bytes = self._copied_bytes = 0
        self._lock = threading.Lock()  # of the two sums
        self._stall_s = stall_s
        self._last_progress = time.monotonic()
        self._stopped = threading.Event()
        self._error: Exception | None = None
        # A thread that waits for dead network storage cannot be ended, and must not keep the process alive.
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(_NUM_THREADS)]

    def __enter__(self) -> ShardCopier:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._join(1.0)

    def progress(self, wait_s: float) -> CopyProgress:
        """Wait until the copying has ended, but at most `wait_s`, and return the progress.

        Raises:
            DataError: if a shard cannot be copied, or no byte was copied for too long.
        """
        self._join(wait_s)
        if self._error is not None:
            raise self._error
        finished = not any(thread.is_alive() for thread in self._threads)
        silent_s = time.monotonic() - self._last_progress
        if not finished and silent_s > self._stall_s:
            raise DataError(
                "copying of shards to this node makes no progress",
                given=f"no byte for {silent_s:.0f} s",
                fix="check the storage of the shards, and the folder data.stage; or raise run.hang_timeout_s",
            )
        with self._lock:
            done = self._in_place_bytes + self._copied_bytes
            return CopyProgress(self._total_bytes, done, self._copied_bytes, finished)

    def _join(self, wait_s: float) -> None:
        deadline = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        """Stage one shard after the other until none is left; each thread runs this."""
        while not self._stopped.is_set():
            try:
                shard = self._waiting.popleft()
            except IndexError:
                return
            try:
                if not self._stage(shard):
                    self._waiting.append(shard)
                    self._note(copied=0)
                    self._stopped.wait(_PAUSE_S)
            except _StoppedError:
                return
            except Exception as error:
                self._error = error
                self._stopped.set()

    def _stage(self, shard: ShardCopy) -> bool:
        """Copy a shard unless its copy is there; return False if another process copies it now.

        Raises:
            DataError: if the shard cannot be copied.
        """
        if not shard.is_staged:
            with _naming_folder(shard.target.parent):
                shard.target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with _claimed(shard.partial) as stream:
                    if stream is None:
                        return False
                    if not shard.is_staged:  # another process may have copied it in the meantime
                        shard.target.unlink(missing_ok=True)
                        self._fill(shard, stream)
                        os.replace(shard.partial, shard.target)
                        return True
        self._note(in_place=shard.num_bytes)
        return True

    def _fill(self, shard: ShardCopy, stream: BinaryIO) -> None:
        """Write, check and date a copy in progress; another attempt is made if that fails.

        Raises:
            DataError: if the shard cannot be read, or the copy is not what was written.
            OSError: if the copy cannot be written.
        """
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                self._write(shard, stream)
                self._check(shard)
                break
            except (DataError, OSError):
                self._note(copied=-stream.tell())
                if attempt == _ATTEMPTS:
                    raise
                self._stopped.wait(_PAUSE_S)
        os.utime(stream.fileno(), ns=(shard.version[1], shard.version[1]))

    def _write(self, shard: ShardCopy, stream: BinaryIO) -> None:
        stream.seek(0)
        for block in _blocks(shard.source):
            left = memoryview(block)
            while left:
                written = stream.write(left)  # less than all of it on a disk that is nearly full
                self._note(copied=written)
                left = left[written:]
        if stream.tell() != shard.num_bytes:
            raise DataError(
                f"{shard.source}: the shard changed while it was copied",
                fix="wait until `everest-ds data pack` or `data cache` has ended, and start again",
            )
        stream.truncate()
        os.fsync(stream.fileno())

    def _check(self, shard: ShardCopy) -> None:
        """Compare the samples or draws in a copy with their checksums.

        Those that are damaged in the store as well are left to those who read them.
        """
        damaged = self._damaged(shard.partial, shard.parts)
        if not damaged:
            return
        if damaged != self._damaged(shard.source, shard.parts):
            raise DataError(
                f"{shard.target}: the copy differs from {shard.source}",
                fix="name a folder on another disk in data.stage",
            )
        logger.warning("%s: damaged samples or draws in this shard: %d", shard.source, len(damaged))

    def _damaged(self, file: Path, parts: NDArray[np.int64]) -> list[int]:
        """Return the starts of the samples or draws whose content differs from their checksum."""
        damaged = []
        for start, num_bytes, expected in parts.tolist():
            checksum = length = 0
            for block in _blocks(file, start, num_bytes):
                checksum, length = zlib.crc32(block, checksum), length + len(block)
                self._note(copied=0)
            if (checksum, length) != (expected, num_bytes):
                damaged.append(start)
        return damaged

    def _note(self, *, copied: int = 0, in_place: int = 0) -> None:
        """Note progress.

        Raises:
            _StoppedError: if the copying was stopped.
        """
        if self._stopped.is_set():
            raise _StoppedError
        with self._lock:
            self._copied_bytes += copied
            self._in_place_bytes += in_place
        self._last_progress = time.monotonic()


class _StoppedError(Exception):
    """The signal that ends the threads."""


@contextmanager
def _claimed(partial: Path) -> Iterator[BinaryIO | None]:
    """Lock a copy in progress and yield it, or yield None if another process holds it.

    The system releases the lock when the process ends, however it ends. A copy that was not finished is
    removed at the end of the block.
    """
    with open(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b", buffering=0) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        if not _is_named(stream, partial):  # its last holder has just given it the name of a whole copy
            yield None
            return
        try:
            yield stream
        finally:
            if _is_named(stream, partial):
                partial.unlink()


def _is_named(stream: BinaryIO, name: Path) -> bool:
    """Return whether `name` is the name of an open file."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(stream.fileno()), name.stat())
    return False


@contextmanager
def _naming_folder(folder: Path) -> Iterator[None]:
    """Turn an error of the file system within the context into a DataError that says what to do."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: shards cannot be copied to this folder of data.stage",
            given=error.strerror or str(error),
            fix="free disk space there, or name another folder; the same command keeps what is copied",
        ) from None


def _blocks(file: Path, start: int = 0, num_bytes: int | None = None) -> Iterator[bytes]:
    """Yield a part of a file in blocks; it may end early.

    Raises:
        DataError: if the file cannot be read.
    """
    try:
        with open(file, "rb", buffering=0) as stream:
            stream.seek(start)
            left = os.fstat(stream.fileno()).st_size if num_bytes is None else num_bytes
            while left > 0 and (block := stream.read(min(left, _BLOCK_BYTES))):
                left -= len(block)
                yield block
    except OSError as error:
        raise DataError(f"{file}: cannot be read", given=error.strerror) from None
