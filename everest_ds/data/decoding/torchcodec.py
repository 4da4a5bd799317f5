"""Decoding through torchcodec, an optional library that uses the system's FFmpeg libraries.

torchcodec is exact for H.264 and similar codecs in MP4 and Matroska (WebM); for AVI with reordered pictures,
torchcodec 0.13 returns neighbouring pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from everest_ds.data.decoding.pyav import PyAVVideo
from everest_ds.data.decoding.video import FIX, Video
from everest_ds.errors import DataError

_ERRORS = (RuntimeError, ValueError, IndexError, StopIteration)


class TorchcodecVideo(Video):
    """A video file opened with torchcodec; see `decoding.open_video`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        codec = import_torchcodec()
        options = {"num_ffmpeg_threads": 1, "dimension_order": "NHWC", "seek_mode": "exact"}
        try:
            self._decoder: Any = codec.decoders.VideoDecoder(str(path.absolute()), **options)
        except _ERRORS as error:
            reason = " ".join(str(error).split("\n")[0].split())[:160]
            raise DataError(f"{path}: not a readable video", given=reason, fix=FIX) from None
        self.num_frames = len(self._decoder)
        if self.num_frames == 0:
            raise DataError(f"{path}: the video holds no picture", fix=FIX)

    def close(self) -> None:
        """Free the decoder."""
        self._decoder = None

    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        try:
            pictures: torch.Tensor = self._decoder.get_frames_at(list(indices)).data
            return pictures
        except _ERRORS:  # PyAV decodes them instead, and its errors name the damaged frames
            with PyAVVideo(self.path) as video:
                return video.read(indices)


def import_torchcodec() -> Any:
    """Import and return torchcodec.

    Raises:
        ImportError, OSError, RuntimeError: if torchcodec is not installed, or does not find FFmpeg.
    """
    import torchcodec.decoders

    return torchcodec
