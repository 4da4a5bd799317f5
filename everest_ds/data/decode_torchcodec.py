"""Pictures of MP4 and Matroska (WebM) files through torchcodec, an optional library.

Elsewhere it is not exact (torchcodec 0.13): of AVI with reordered pictures it returns neighbours. It finds
FFmpeg's libraries on the system.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from everest_ds.data.decode_pyav import PyAVVideo
from everest_ds.data.video import FIX, Size, Video, shrunk
from everest_ds.errors import DataError

_ERRORS = (RuntimeError, ValueError, IndexError, StopIteration)


class TorchcodecVideo(Video):
    """An open video file; see `decode.open_video`."""

    def __init__(self, path: Path, short_side: int | None = None) -> None:
        self.path = path
        self._short_side = short_side
        try:
            self._decoder: Any = self._open()
            facts = self._decoder.metadata
        except _ERRORS as error:
            reason = " ".join(str(error).split("\n")[0].split())[:160]
            raise DataError(f"{path}: not a readable video", given=reason, fix=FIX) from None
        if facts.codec == "vp8":
            raise DataError(f"{path}: torchcodec counts pictures of VP8 that are never shown")
        self.num_frames = len(self._decoder)
        if self.num_frames == 0:
            raise DataError(f"{path}: the video holds no picture", fix=FIX)

    def close(self) -> None:
        """See `Video.close`."""
        self._decoder = None

    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        try:
            pictures: torch.Tensor = self._decoder.get_frames_at(list(indices)).data
            return pictures
        except _ERRORS:  # PyAV names what it cannot decode
            with PyAVVideo(self.path, self._short_side) as video:
                return video.read(indices)

    def _open(self) -> Any:
        codec = import_torchcodec()
        options = {"num_ffmpeg_threads": 1, "dimension_order": "NHWC", "seek_mode": "exact"}
        decoder = codec.decoders.VideoDecoder(str(self.path.absolute()), **options)
        size = shrunk(Size(decoder.metadata.width, decoder.metadata.height), self._short_side)
        if size is None:
            return decoder
        resize = codec.transforms.Resize((size.height, size.width))
        return codec.decoders.VideoDecoder(str(self.path.absolute()), transforms=[resize], **options)


def import_torchcodec() -> Any:
    """The library.

    Raises:
        ImportError, OSError, RuntimeError: it is not installed, or does not find FFmpeg.
    """
    import torchcodec.decoders
    import torchcodec.transforms

    return torchcodec
