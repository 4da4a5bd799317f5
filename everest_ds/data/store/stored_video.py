"""Reading of a sample's frames from a shard: one read for their sizes, and one for each wanted frame.

Everything that is read is compared with its checksum, so damage never reaches a model; the error names the
sample, the frame and the shard.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from everest_ds.data.decoding.video import Need, Pictures, Size, Video, shrunk
from everest_ds.data.store import jpeg
from everest_ds.data.store.layout import (
    BLOCK_BYTES,
    FRAMES,
    NPY_HEADER_BYTES,
    RECORD_BYTES,
    StoredFrames,
    StoreKind,
)
from everest_ds.errors import DataError

_AT_ONCE_BYTES = 1 << 26  # of a sample that is compared with its checksum
_MOST_OPEN = 64  # shards that a process keeps open; opening a file takes long on a network file system


class StoredVideo(Video):
    """The frames of one sample of a store; see `decoding.open_video`.

    Frames have their numbers in the video. If not all of them are kept, a frame that is not is represented by
    the kept frame before it.
    """

    def __init__(self, path: Path, frames: StoredFrames, short_side: int | None = None) -> None:
        self.path = path
        self.num_frames = frames.num_frames
        self._frames = frames
        self._stored_size = Size(frames.width, frames.height)
        self._size = shrunk(self._stored_size, short_side) or self._stored_size
        self._lengths, self._checksums = self._read_records()
        spans = -(-self._lengths // BLOCK_BYTES) * BLOCK_BYTES
        self._starts = frames.start + np.cumsum(BLOCK_BYTES + spans) - spans

    def close(self) -> None:
        """Do nothing: the shard stays open for other samples."""

    def read_needed(self, indices: Sequence[int], need: Callable[[Size], Need]) -> Pictures:
        """Decode the part of the pictures `indices` that `need` names, and not much more.

        Raises:
            DataError: as `read`.
        """
        if self._size != self._stored_size:
            return super().read_needed(indices, need)
        self._check_range(indices)
        part = need(self._size)
        return Pictures(self._decode(indices, part.rows.stop, part.reduction), self._size, part.reduction)

    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        pixels = self._decode(indices, self._frames.height, 1)
        if self._size == self._stored_size:
            return pixels
        planes = pixels.permute(0, 3, 1, 2)
        sides = (self._size.height, self._size.width)
        smaller = torch.nn.functional.interpolate(planes, sides, mode="bilinear", antialias=True)
        return smaller.permute(0, 2, 3, 1).contiguous()

    def _decode(self, indices: Sequence[int], rows: int, reduction: int) -> torch.Tensor:
        wanted = [index // self._frames.every for index in indices]
        row_of = {kept: row for row, kept in enumerate(sorted(set(wanted)))}
        height, width = jpeg.decoded_size(self._stored_size, rows, reduction)
        pictures = np.empty((len(row_of), height, width, 3), np.uint8)
        for kept, row in row_of.items():
            self._decode_into(pictures[row], kept, rows, reduction)
        decoded = torch.from_numpy(pictures)
        return decoded if list(row_of) == wanted else decoded[[row_of[kept] for kept in wanted]]

    def _decode_into(self, out: NDArray[np.uint8], kept: int, rows: int, reduction: int) -> None:
        data = read_part(self._frames.shard, int(self._starts[kept]), int(self._lengths[kept]))
        try:
            if zlib.crc32(data) != self._checksums[kept]:
                raise ValueError("the checksum differs")
            jpeg.decode(data, self._stored_size, rows, reduction, out)
        except ValueError as error:
            frame = kept * self._frames.every
            raise DataError(
                f"{self.path}: frame {frame} is damaged in {self._frames.shard}",
                given=error,
                fix=FRAMES.repair,
            ) from None

    def _read_records(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the sizes and the checksums of the kept frames."""
        num_kept = -(-self._frames.num_frames // self._frames.every)
        size = NPY_HEADER_BYTES + RECORD_BYTES * num_kept
        content = read_part(self._frames.shard, self._frames.records_at, size)
        if zlib.crc32(content) != self._frames.records_checksum:
            raise DataError(
                f"{self.path}: the list of its frames is damaged in {self._frames.shard}", fix=FRAMES.repair
            )
        records = np.frombuffer(content, "<u4", offset=NPY_HEADER_BYTES).reshape(-1, 2).astype(np.int64)
        return records[:, 0], records[:, 1]


def check_stored(path: Path, frames: StoredFrames) -> None:
    """Compare every byte of a sample in its shard with its checksum, and decode its frames.

    Args:
        path: name of the sample, for messages.
        frames: the place of its frames.

    Raises:
        DataError: if a byte differs; the error names the frame, if it is in one.
    """
    video = StoredVideo(path, frames)
    for _ in video.read_all():
        pass
    checksum = 0
    for start in range(0, frames.num_bytes, _AT_ONCE_BYTES):
        size = min(_AT_ONCE_BYTES, frames.num_bytes - start)
        checksum = zlib.crc32(read_part(frames.shard, frames.start + start, size), checksum)
    if checksum != frames.checksum:
        raise DataError(
            f"{path}: a header or description of it is damaged in {frames.shard}", fix=FRAMES.repair
        )


def read_part(shard: Path, start: int, num_bytes: int) -> bytes:
    """Read a part of a shard.

    Raises:
        DataError: if the shard is missing, cannot be read, or ends before that part does.
    """
    with _naming(shard, FRAMES):
        content = os.pread(_opened(shard).descriptor, num_bytes, start)
    _check_whole(shard, start, len(content), num_bytes, FRAMES)
    return content


def read_into(shard: Path, start: int, buffer: NDArray[np.uint8], kind: StoreKind) -> None:
    """Fill a buffer with the part of a shard that begins at `start`, in a store of this kind.

    Raises:
        DataError: as `read_part`.
    """
    with _naming(shard, kind):
        num_read = os.preadv(_opened(shard).descriptor, [buffer.data], start)
    _check_whole(shard, start, num_read, len(buffer), kind)


@contextmanager
def _naming(shard: Path, kind: StoreKind) -> Iterator[None]:
    """Turn an error of the file system within the context into a DataError that names the shard."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{shard}: this shard of the {kind.title} is missing", fix=kind.repair) from None
    except OSError as error:
        _opened.cache_clear()  # network storage may have replaced the file
        raise DataError(f"{shard}: cannot be read", given=error.strerror) from None


def _check_whole(shard: Path, start: int, num_read: int, num_bytes: int, kind: StoreKind) -> None:
    if num_read < num_bytes:
        raise DataError(
            f"{shard}: this shard of the {kind.title} is cut off",
            given=f"{start + num_read} bytes",
            allowed=f"{start + num_bytes} or more",
            fix=kind.repair,
        )


class _OpenShard:
    """An open shard, which is closed when it is forgotten."""

    def __init__(self, shard: Path) -> None:
        self.descriptor = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@lru_cache(maxsize=_MOST_OPEN)
def _opened(shard: Path) -> _OpenShard:
    return _OpenShard(shard)
