"""Decoding through decord, which is exact for H.264 and similar codecs in MP4.

For other files, decord 0.6.0 is silently wrong: for AVI, which stores no presentation timestamps, and for
MPEG-4, some sets of indices return other pictures; for WebM, pictures that are never shown are counted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from everest_ds.data.decoding.pyav import PyAVVideo
from everest_ds.data.decoding.video import FIX, Video
from everest_ds.errors import DataError


class DecordVideo(Video):
    """A video file opened with decord; see `decoding.open_video`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: Any = self._open()
        self.num_frames = len(self._reader)
        if self.num_frames == 0:
            raise DataError(f"{path}: the video holds no picture", fix=FIX)

    def close(self) -> None:
        """Free the decoder."""
        self._reader = None

    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        decord = _import_decord()
        if self._reader is not None:
            try:
                return torch.from_numpy(self._reader.get_batch(list(indices)).asnumpy())
            except (RuntimeError, decord.DECORDError):
                self._reader = None  # its decoding thread has died
        # decord's thread reads ahead, further on a busier machine, and may have met damage that affects none
        # of the wanted pictures. PyAV decodes only the wanted pictures, and its errors name the damaged ones.
        with PyAVVideo(self.path) as video:
            return video.read(indices)

    def _open(self) -> Any:
        decord = _import_decord()
        try:
            reader = decord.VideoReader(str(self.path.absolute()), num_threads=1)
            # x264 writes its version into the first packet only, and FFmpeg needs it for 4:4:4 files of older
            # versions: if the first read began further on, it would return garbage. The frame is read as a
            # batch, because only batches fail for sizes that decord does not support (such as a width of 48
            # pixels).
            if len(reader):
                reader.get_batch([0])
        except (RuntimeError, decord.DECORDError) as error:
            reason = " ".join(str(error).split("\n")[0].split())[:160]
            raise DataError(f"{self.path}: not a readable video", given=reason, fix=FIX) from None
        return reader


def _import_decord() -> Any:
    # The number of retries after damage, which decord reads once, at import. Its default of 10240 takes
    # minutes on a truncated file, and a few hundred are not enough for some intact files.
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord
