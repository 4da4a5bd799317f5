"""Pictures of MP4 files through decord, which is exact there.

Not so elsewhere (decord 0.6.0): of AVI, which stores no time of showing, some sets of indices come back
wrong; of WebM, pictures that are never shown are counted; and nothing says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from everest_ds.data.decode_pyav import PyAVVideo
from everest_ds.errors import DataError

_FIX = "replace the file, or take it out of the manifest (`everest-ds data check` lists all such files)"


class DecordVideo:
    """An open video file; see `decode.Video`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._reader: Any = self._open()
        self.num_frames = len(self._reader)
        if self.num_frames == 0:
            raise DataError(f"{path}: the video holds no picture", fix=_FIX)

    def __enter__(self) -> DecordVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the decoder."""
        self._reader = None

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """See `decode.Video.read`."""
        outside = [i for i in indices if not 0 <= i < self.num_frames]
        if outside or not len(indices):
            allowed = f"0..{self.num_frames - 1}"
            raise DataError(f"{self._path}: no such frame", given=outside or "no index", allowed=allowed)
        decord = _import_decord()
        if self._reader is not None:
            try:
                return torch.from_numpy(self._reader.get_batch(list(indices)).asnumpy())
            except (RuntimeError, decord.DECORDError):
                self._reader = None  # its thread is dead now
        # decord's thread reads ahead, the further the busier the machine, and may have met damage that no
        # wanted picture needs. PyAV decodes what is asked for, and names what it cannot.
        with PyAVVideo(self._path) as video:
            return video.read(indices)

    def _open(self) -> Any:
        decord = _import_decord()
        try:
            reader = decord.VideoReader(str(self._path.absolute()), num_threads=1)
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
        return DataError(f"{self._path}: not a readable video", given=reason, fix=_FIX)


def _import_decord() -> Any:
    # Before the import: decord reads it once. How often a read past damage is tried again; its default of
    # 10240 takes minutes on a file that was cut off, and a few hundred are not enough for some whole files.
    os.environ.setdefault("DECORD_EOF_RETRY_MAX", "2048")
    import decord

    decord.logging.set_level(decord.logging.QUIET)
    return decord
