"""Pictures of a video file, by number and exactly: the only door to video files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from everest_ds.data.decode_decord import DecordVideo
from everest_ds.data.decode_pyav import PyAVVideo
from everest_ds.errors import DataError


class Video(Protocol):
    """An open video file, of the process that opened it. Use it in a `with`, or `close` it.

    Attributes:
        num_frames: number of pictures in the file.
    """

    num_frames: int

    def __enter__(self) -> Video: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """Free the decoder; the video cannot be read any more."""

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The pictures `indices`, in that order, repeats allowed: RGB, uint8 (len(indices), H, W, 3).

        Errors:
            DataError: an index outside 0..num_frames-1, or the file is damaged where it is read.
        """


def open_video(path: Path) -> Video:
    """Open a video file: through decord where that is exact (MP4), through PyAV elsewhere.

    Errors:
        DataError: the file is missing, empty, not a video, cut off, or holds no picture.
    """
    if not path.exists():
        raise DataError(f"{path}: no such video file")
    if not path.is_file():
        raise DataError(f"{path}: not a file", given="a folder" if path.is_dir() else "a device")
    try:
        with open(path, "rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read", given=error.strerror) from None
    if not head:
        raise DataError(
            f"{path}: the video file is empty",
            given="0 bytes",
            fix="replace the file, or take it out of the manifest",
        )
    if head[4:8] == b"ftyp":  # MP4
        with suppress(DataError):  # PyAV knows more codecs, and says more plainly what is wrong
            return DecordVideo(path)
    return PyAVVideo(path)
