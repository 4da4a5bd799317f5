"""Pictures through decord, which is exact for H.264 and the like in MP4.

Not so elsewhere (decord 0.6.0): of AVI, which stores no time of showing, and of MPEG-4, some sets of indices
come back wrong; of WebM, pictures that are never shown are counted; and nothing says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from everest_ds.data.decode_pyav import PyAVVideo
from everest_ds.data.video import FIX, Video
from everest_ds.errors import DataError


class DecordVideo(Video):
    """An open video file; see `decode.open_video`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: Any = self._open()
        self.num_frames = len(self._reader)
        if self.num_frames == 0:
            raise DataError(f"{path}: the video holds no picture", fix=FIX)

    def close(self) -> None:
        """See `Video.close`."""
        self._reader = None

    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        decord = _import_decord()
        if self._reader is not None:
            try:
                return torch.from_numpy(self._reader.get_batch(list(indices)).asnumpy())
            except (RuntimeError, decord.DECORDError):
                self._reader = None  # its thread is dead now
        # decord's thread reads ahead, the further the busier the machine, and may have met damage that no
        # wanted picture needs. PyAV decodes what is asked for, and names what it cannot.
        with PyAVVideo(self.path) as video:
            return video.read(indices)

    def _open(self) -> Any:
        decord = _import_decord()
        try:
            reader = decord.VideoReader(str(self.path.absolute()), num_threads=1)
            # x264 names its version in the first packet only, and FFmpeg decodes the 4:4:4 files of older
            # versions rightly only if it saw that: a first read further on would be garbage. As a batch,
            # because that is what fails for sizes that decord cannot do (48 pixels wide, for one).
            if len(reader):
                reader.get_batch([0])
        except (RuntimeError, decord.DECORDError) as error:
            raise self._unreadable(error) from None
        return reader

    def _unreadable(self, error: Exception) -> DataError:
        reason = " ".join(str(error).split("\n")[0].split())[:160]
        return DataError(f"{self.path}: not a readable video", given=reason, fix=FIX)


def _import_decord() -> Any:
    # Before the import: decord reads it once. How often a read past damage is tried again; its default of
    # 10240 takes minutes on a file that was cut off, and a few hundred are not enough for some whole files.
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord
