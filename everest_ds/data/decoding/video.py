"""The interface of an open video, common to all decoders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from everest_ds.errors import DataError

FIX = "replace the file, or remove it from the manifest (`everest-ds data check` lists all such files)"
AT_ONCE = 32  # pictures that `read_all` decodes per call, which bounds the memory that they take


class Size(NamedTuple):
    """The size of a picture, in pixels."""

    width: int
    height: int


REDUCTIONS = (8, 4, 2, 1)  # factors by which a decoder may reduce pictures before they are cropped


class Need(NamedTuple):
    """The part of a clip's pictures that its crops need.

    Attributes:
        rows: the needed rows; the others may be missing.
        columns: the needed columns; the others may be missing.
        reduction: one of `REDUCTIONS`; the pictures may be this many times smaller.
    """

    rows: range
    columns: range
    reduction: int


class Motion(NamedTuple):
    """The motion in a clip's pictures, as the encoder of the video found it.

    Attributes:
        speed: float32 (F, rows, columns, 2): pixels per picture, downwards and to the right, of the cells
            that the whole pictures are cut into; 0 where the stream has no vector, as in intra-coded blocks.
        number: int64 (F,), the numbers of the pictures in the video.
        cell: height and width of a cell, in pixels of the whole pictures.
        top, left: place of the first cell in the whole pictures, in pixels.
    """

    speed: NDArray[np.float32]
    number: NDArray[np.int64]
    cell: float
    top: float = 0
    left: float = 0


class Pictures(NamedTuple):
    """The decoded pictures of a clip, whole or the part that was needed.

    Attributes:
        pixels: uint8 (F, rows / reduction, columns / reduction, 3), RGB.
        size: size of the whole pictures, before they were reduced.
        reduction: the factor by which they were reduced.
        top: first row of the whole pictures that `pixels` holds.
        left: first column of the whole pictures that `pixels` holds.
        motion: the motion in the pictures, if the video was opened for it.
    """

    pixels: torch.Tensor
    size: Size
    reduction: int
    top: int = 0
    left: int = 0
    motion: Motion | None = None

    def split(self, num_pictures: int) -> Iterator[Pictures]:
        """Yield parts of this many pictures each."""
        for first in range(0, len(self.pixels), num_pictures):
            part = slice(first, first + num_pictures)
            motion = self.motion
            if motion is not None:
                motion = motion._replace(speed=motion.speed[part], number=motion.number[part])
            yield self._replace(pixels=self.pixels[part], motion=motion)


class NoMotionError(DataError):
    """Error for an intact video of which no motion vectors can be had."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path}: no motion vectors",
            given=reason,
            allowed="a video file in H.264, MPEG-4 or another codec whose vectors FFmpeg exports",
            fix="tokens.score=pixel scores any video",
        )


class Video(ABC):
    """An open video file, usable in the process that opened it, in a `with` statement or until `close`.

    Attributes:
        path: the file.
        num_frames: number of pictures.
    """

    path: Path
    num_frames: int

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """Return the pictures `indices`, in that order, repeats allowed: RGB, uint8 (len(indices), H, W, 3).

        Each picture is decoded once.

        Raises:
            DataError: if an index lies outside 0..num_frames-1, or the file is damaged at these pictures.
        """
        self._check_range(indices)
        ascending = sorted(set(indices))
        if ascending == list(indices):
            return self._read(ascending)
        place = {index: row for row, index in enumerate(ascending)}
        return self._read(ascending)[[place[index] for index in indices]]

    def read_needed(self, indices: Sequence[int], need: Callable[[Size], Need]) -> Pictures:
        """Decode at least the part of the pictures `indices` that `need` names for pictures of this size.

        Raises:
            DataError: as `read`.
        """
        pixels = self.read(indices)  # these decoders always produce whole pictures
        return Pictures(pixels, Size(pixels.shape[2], pixels.shape[1]), 1)

    def read_all(self, every: int = 1) -> Iterator[torch.Tensor]:
        """Decode the pictures 0, `every`, 2 `every` ... in order, a few at a time.

        Yields:
            RGB, uint8 (at most `AT_ONCE`, H, W, 3).
        """
        for part in in_parts(range(0, self.num_frames, every)):
            yield self.read(part)

    def _check_range(self, indices: Sequence[int]) -> None:
        outside = [i for i in indices if not 0 <= i < self.num_frames]
        if outside or not len(indices):
            allowed = f"0..{self.num_frames - 1}"
            raise DataError(f"{self.path}: no such frame", given=outside or "no index", allowed=allowed)

    @abstractmethod
    def close(self) -> None:
        """Free the decoder; the video cannot be read afterwards."""

    @abstractmethod
    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        """Decode the pictures `indices`, which are in range and ascend without repeats."""


class Window(Video):
    """A span of frames of an open video, numbered from 0; closing the window closes the video."""

    def __init__(self, video: Video, span: tuple[int, int]) -> None:
        first, stop = span
        if stop > video.num_frames:
            video.close()
            raise DataError(
                f"{video.path}: the video is shorter than the span of frames that the manifest names",
                given=f"frames {first} to {stop - 1}",
                allowed=f"0..{video.num_frames - 1}",
            )
        self.path, self.num_frames = video.path, stop - first
        self._video, self._first = video, first

    def close(self) -> None:
        """Close the underlying video."""
        self._video.close()

    def read_needed(self, indices: Sequence[int], need: Callable[[Size], Need]) -> Pictures:
        """Decode as `Video.read_needed` does."""
        self._check_range(indices)
        return self._video.read_needed([self._first + i for i in indices], need)

    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        return self._video.read([self._first + i for i in indices])


def in_parts(indices: range) -> Iterator[range]:
    """Yield consecutive parts of `indices`, of at most `AT_ONCE` each."""
    return (indices[first : first + AT_ONCE] for first in range(0, len(indices), AT_ONCE))


def shrunk(size: Size, short_side: int | None) -> Size | None:
    """Return `size` scaled down to `short_side` at the same aspect ratio, or None if it need not shrink."""
    shorter = min(size)
    if short_side is None or shorter <= short_side:
        return None
    return Size(*(round(side * short_side / shorter) for side in size))
