"""Shards: the tar files that samples are appended to, one after the other, and their repair after a crash."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from everest_ds.data.store.layout import END_OF_TAR, FRAMES, LIST_FILE, SHARDS, StoreKind, shard_name
from everest_ds.errors import DataError, UsageError

SHARD_BYTES = 1 << 30  # a shard that has reached this size is closed
_OWN = (".", "index-", "packing-")  # beginnings of the names of other files in a store


class InShard(Protocol):
    """The record of a sample in a shard."""

    @property
    def shard(self) -> int:
        """Number of the shard."""
        ...

    @property
    def start(self) -> int:
        """Offset of the sample's first member in the shard."""
        ...

    @property
    def stop(self) -> int:
        """Offset of the end of the sample's last member."""
        ...


Row = TypeVar("Row", bound=InShard)


class ShardWriter:
    """The shard that samples are appended to, and the following ones once it is full.

    Attributes:
        next_shard: number of the next shard.

    Args:
        folder: folder of the shards.
        next_shard: as the attribute.
        shard_bytes: size at which a shard is closed.
    """

    def __init__(self, folder: Path, next_shard: int, shard_bytes: int) -> None:
        self.next_shard = next_shard
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._stream: BinaryIO | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if self._stream is not None:
            with self._stream:
                if kind is None:
                    close_shard(self._stream)

    def begin(self) -> tuple[BinaryIO, int, int]:
        """Return the stream to append a sample to, the number of its shard, and the sample's offset in it.

        Raises:
            OSError: if the disk is full.
        """
        if self._stream is not None and self._stream.tell() >= self._shard_bytes:
            with self._stream as full:
                self._stream = None
                close_shard(full)
        if self._stream is None:
            self._stream = open(self._folder / shard_name(self.next_shard), "xb")
            self.next_shard += 1
        return self._stream, self.next_shard - 1, self._stream.tell()


def close_shard(stream: BinaryIO) -> None:
    """Write the end of a tar file and wait until the file is on the disk.

    Raises:
        OSError: if the disk is full.
    """
    stream.seek(0, os.SEEK_END)
    stream.write(END_OF_TAR)
    stream.flush()
    os.fsync(stream.fileno())


def repair_shards(shards: Path, recorded: Iterable[Row], is_intact: Callable[[Row], bool]) -> list[Row]:
    """Make shards agree with the record of their samples after an interruption; return the lost samples.

    What a shard holds behind its last recorded sample is cut off. Samples are lost if their shard is missing
    or too short, or if it was not closed and their content is not what was written.

    Args:
        shards: folder of the shards; it is created.
        recorded: the samples that the record names.
        is_intact: returns whether a sample's content is as it was written.

    Raises:
        OSError: if a shard cannot be written.
    """
    by_shard: dict[int, list[Row]] = {}
    for row in recorded:
        by_shard.setdefault(row.shard, []).append(row)
    shards.mkdir(parents=True, exist_ok=True)
    on_disk = {int(file.stem) for file in shards.glob("*.tar") if file.stem.isdecimal()}
    lost: list[Row] = []
    for shard in on_disk | by_shard.keys():
        rows = sorted(by_shard.get(shard, []), key=lambda row: row.start)
        lost += rows[_repair(shards / shard_name(shard), rows, is_intact) :]
    return lost


def _repair(file: Path, rows: list[Row], is_intact: Callable[[Row], bool]) -> int:
    """Repair one shard, and return how many of its samples, which are in order, are kept."""
    size = file.stat().st_size if file.is_file() else 0
    if rows and size == rows[-1].stop + len(END_OF_TAR):
        return len(rows)
    num_kept = next(
        (place for place, row in enumerate(rows) if row.stop > size or not is_intact(row)), len(rows)
    )
    if not num_kept:
        with suppress(FileNotFoundError):
            file.unlink()
    else:
        with open(file, "r+b") as stream:
            stream.truncate(rows[num_kept - 1].stop)
            close_shard(stream)
    return num_kept


def check_room(folder: Path, needed_bytes: float, kind: StoreKind, fix: str) -> None:
    """Check that the disk of `folder`, which need not exist yet, has room for so many bytes.

    Args:
        folder: folder to write to.
        needed_bytes: bytes that will be written.
        kind: the kind of store.
        fix: what to do if the room does not suffice.

    Raises:
        DataError: if it does not suffice.
    """
    existing = next(place for place in [folder, *folder.absolute().parents] if place.is_dir())
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise DataError(
            f"{folder}: too little disk space for the {kind.title}",
            given=f"{free / 1e9:.1f} GB free",
            allowed=f"about {needed_bytes / 1e9:.1f} GB",
            fix=fix,
        )


@contextmanager
def packing_into(out: Path, inputs: Iterable[Path], kind: StoreKind = FRAMES) -> Iterator[None]:
    """Lock the folder of a store while it is written.

    Args:
        out: the folder; it is created.
        inputs: the files that are read, none of which may lie in the folder.
        kind: the kind of store.

    Raises:
        UsageError: if another process packs into the folder, or it holds other things than a store.
        DataError: if the folder cannot be written.
    """
    own = (kind.facts_file, LIST_FILE, SHARDS, *kind.other_files)
    names = sorted(entry.name for entry in out.glob("*"))
    foreign = [name for name in names if name not in own and not name.startswith(_OWN)]
    if foreign:
        raise UsageError(
            f"{out}: this folder holds other things than a {kind.title}",
            given=foreign[0],
            fix=f"another {kind.folder_option}",
        )
    if any(file.resolve().is_relative_to(out.resolve()) for file in inputs):
        raise UsageError(
            f"{out}: an input of the command lies in this folder", fix=f"choose another {kind.folder_option}"
        )
    with naming_errors(out, kind):
        out.mkdir(parents=True, exist_ok=True)
        lock = open(out / ".lock", "w")
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UsageError(f"{out}: another process packs into this folder", fix="wait for it") from None
        except OSError:
            pass  # a file system without locks
        yield


@contextmanager
def naming_errors(out: Path, kind: StoreKind) -> Iterator[None]:
    """Turn an error of the file system within the context into a DataError that says what to do."""
    try:
        yield
    except ChildProcessError:
        raise  # the workers cannot be started
    except OSError as error:
        raise DataError(
            f"{out}: the {kind.title} cannot be written",
            given=error.strerror or str(error),
            fix=f"free disk space or choose another {kind.folder_option}; repeat the command, which keeps"
            " what is packed",
        ) from None
