"""Exact pictures of any file that FFmpeg reads, through PyAV.

Numbers count the pictures in the order in which they are shown. Opening a file reads its packets without
decoding them; a read then seeks to key frames and recognises the wanted pictures by their timestamps, or, in
a file without dependable timestamps, decodes from the beginning and counts. One thread a video, as loaders
run many processes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from everest_ds.errors import DataError

Picture = NDArray[np.uint8]  # (H, W, 3), RGB
_FIX = "replace the file, or take it out of the manifest"


class _Packet(NamedTuple):
    pts: int | None  # when to show it
    dts: int | None  # when to decode it
    is_key: bool


class PyAVVideo:
    """An open video file; see `decode.Video`.

    Attributes:
        num_frames: number of pictures in the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._container, self._stream = _open(path)
        try:
            self.num_frames = self._index()
            if self.num_frames == 0:
                raise DataError(f"{path}: the video holds no picture", fix=_FIX)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> PyAVVideo:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the decoder; the video cannot be read any more."""
        self._container.close()

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """The pictures `indices`, in that order, repeats allowed: RGB, uint8 (len(indices), H, W, 3).

        Errors:
            DataError: an index outside 0..num_frames-1, or the file is damaged where it is read.
        """
        outside = [i for i in indices if not 0 <= i < self.num_frames]
        if outside or not len(indices):
            allowed = f"0..{self.num_frames - 1}"
            raise DataError(f"{self._path}: no such frame", given=outside or "no index", allowed=allowed)
        pictures = self._pictures(sorted(set(indices)))
        sizes = sorted({f"{p.shape[1]}x{p.shape[0]}" for p in pictures.values()})
        if len(sizes) > 1:
            raise DataError(f"{self._path}: the picture size changes within the video", given=sizes, fix=_FIX)
        return torch.from_numpy(np.stack([pictures[i] for i in indices]))

    def _index(self) -> int:
        """Learn where the pictures are; how many there are."""
        with _naming(self._path):
            packets, first = _packets(self._path, self._container, self._stream)
            self._numbers: dict[int | None, int] | None = None  # by timestamp, where timestamps serve
            self._keys: list[tuple[int, _Packet]] = []
            if not _timestamps_serve(self._container, self._stream, packets):
                return sum(1 for _ in self._from_start())
            shown = sorted(packets, key=lambda packet: packet.pts or 0)
            self._numbers = {packet.pts: number for number, packet in enumerate(shown)}
            self._keys = [(number, packet) for number, packet in enumerate(shown) if packet.is_key]
            # x264 names its version in the first packet only, and FFmpeg decodes the 4:4:4 files of older
            # versions rightly only if it saw that: without this, all after the second key frame is garbage.
            if first is not None:
                self._stream.decode(first)
            return len(shown)

    def _pictures(self, wanted: list[int]) -> dict[int, Picture]:
        """The pictures `wanted` (ascending), by number."""
        found: dict[int, Picture] = {}
        with _naming(self._path):
            for key, group in groupby(wanted, self._key_before):
                found |= self._pictures_after(key, list(group))
        if len(found) < len(wanted):
            missing = [i for i in wanted if i not in found]
            raise DataError(f"{self._path}: damaged, cannot decode frames {missing}", fix=_FIX)
        return found

    def _key_before(self, number: int) -> _Packet | None:
        """The last key frame shown no later than frame `number`; None: begin at the start."""
        rank = bisect_right(self._keys, number, key=lambda key: key[0])
        return self._keys[rank - 1][1] if rank else None

    def _pictures_after(self, key: _Packet | None, wanted: list[int]) -> dict[int, Picture]:
        # Some containers seek by the time of showing, some by that of decoding, which may miss the key frame.
        times = (key.pts, key.dts) if key else ()
        for time in times:
            if time is not None:
                self._container.seek(time, stream=self._stream)
                found = _collect(_from_key_frame(self._decoded(), wanted[0]), wanted)
                if len(found) == len(wanted):
                    return found
        return _collect(self._from_start(), wanted)

    def _from_start(self) -> Iterator[tuple[int, Any]]:
        self.close()
        self._container, self._stream = _open(self._path)
        return self._decoded()

    def _decoded(self) -> Iterator[tuple[int, Any]]:
        """Decoded pictures with their numbers, -1 for one that the index does not know."""
        for count, frame in enumerate(self._container.decode(self._stream)):
            yield (count if self._numbers is None else self._numbers.get(frame.pts, -1)), frame


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of which file FFmpeg complains."""
    import av  # heavy, and needed only where videos are read

    try:
        yield
    except av.FFmpegError as error:
        raise DataError(f"{path}: not a readable video ({error.strerror})", fix=_FIX) from error


def _open(path: Path) -> tuple[Any, Any]:
    """The container and its first video stream."""
    import av

    with _naming(path):
        # FFmpeg takes a relative `a:b.mp4` for protocol `a`; titles in other encodings are common.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    stream = next(iter(container.streams.video), None)
    if stream is None:
        container.close()
        raise DataError(f"{path}: the file has no video stream", fix=_FIX)
    if stream.codec_context is None:
        container.close()
        raise DataError(f"{path}: FFmpeg has no decoder for this video", fix=_FIX)
    stream.codec_context.thread_count = 1
    return container, stream


def _packets(path: Path, container: Any, stream: Any) -> tuple[list[_Packet], Any]:
    """Every packet that is shown, in decoding order, and the file's first packet whole (None: no packet)."""
    packets: list[_Packet] = []
    first = None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DataError(f"{path}: cut off or damaged after {len(packets)} frames", fix=_FIX)
        if packet.size and not packet.is_discard:  # an edit list discards; the end of the file has no size
            packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe))
        if packet.size and first is None:
            first = packet
    return packets, first


def _timestamps_serve(container: Any, stream: Any, packets: list[_Packet]) -> bool:
    """Whether each packet has its own time and is one picture shown at that time."""
    times = {packet.pts for packet in packets}
    if None in times or len(times) < len(packets):
        return False
    if stream.codec_context.name == "vp8":  # some packets hold a picture that is never shown
        return False
    if container.format.name == "mpeg":  # has no index: seeks land inside pictures
        return False
    # AVI keeps no time of showing: FFmpeg guesses, wrongly where pictures are reordered.
    return container.format.name != "avi" or all(packet.pts == packet.dts for packet in packets)


def _from_key_frame(decoded: Iterator[tuple[int, Any]], number: int) -> Iterator[tuple[int, Any]]:
    """The same pictures if they begin with a key frame no later than picture `number`, else none.

    What a missed seek finds lacks the pictures it refers to, or comes too late.
    """
    start = next(decoded, None)
    if start is not None and start[1].key_frame and start[0] <= number:
        yield start
        yield from decoded


def _collect(decoded: Iterator[tuple[int, Any]], wanted: list[int]) -> dict[int, Picture]:
    """Those of the pictures `wanted` (ascending) that come up undamaged."""
    found: dict[int, Picture] = {}
    numbers = set(wanted)
    for number, frame in decoded:
        if number in numbers and not frame.is_corrupt:
            found[number] = _rgb(frame)
        if number >= wanted[-1]:
            break
    return found


def _rgb(frame: Any) -> Picture:
    """The picture upright: phones store it lying, with the rotation beside it."""
    picture: Picture = frame.to_ndarray(format="rgb24")
    return np.rot90(picture, frame.rotation // 90) if frame.rotation else picture
