"""Exact decoding of any file that FFmpeg reads, through PyAV.

Pictures are numbered in the order in which they are shown. Opening a file reads its packets without decoding
them; a read then seeks to key frames and recognises the wanted pictures by their timestamps, or, in a file
without reliable timestamps, decodes from the beginning and counts. Each video uses one decoding thread,
because loaders run many processes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from everest_ds.data.decoding.video import FIX, Size, Video, shrunk
from everest_ds.errors import DataError

# An intact file may be a little shorter than its header states. It has at least this share of the stated
# length, less the duration of the last frame, which some files do not state.
_LEAST_LENGTH, _LAST_FRAME_S = 0.95, 0.1
Picture = NDArray[np.uint8]  # (H, W, 3), RGB


class _Packet(NamedTuple):
    pts: int | None  # presentation timestamp
    dts: int | None  # decoding timestamp
    is_key: bool


class PyAVVideo(Video):
    """A video file opened with PyAV; see `decoding.open_video`."""

    def __init__(self, path: Path, short_side: int | None = None) -> None:
        self.path = path
        self._short_side = short_side
        self._container, self._stream = _open(path)
        try:
            self.num_frames = self._index()
            if self.num_frames == 0:
                raise DataError(f"{path}: the video holds no picture", fix=FIX)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file and free the decoder."""
        self._container.close()

    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        pictures = self._pictures(sorted(set(indices)))
        sizes = sorted({f"{p.shape[1]}x{p.shape[0]}" for p in pictures.values()})
        if len(sizes) > 1:
            raise DataError(f"{self.path}: the picture size changes within the video", given=sizes, fix=FIX)
        return torch.from_numpy(np.stack([pictures[i] for i in indices]))

    def _index(self) -> int:
        """Index the pictures by timestamp and key frame, and return their number."""
        with naming(self.path):
            packets, first = _packets(self.path, self._container, self._stream)
            self._numbers: dict[int | None, int] | None = None  # by timestamp, if reliable
            self._keys: list[tuple[int, _Packet]] = []
            if not _timestamps_serve(self._container, self._stream, packets):
                return sum(1 for _ in self._from_start())
            shown = sorted(packets, key=lambda packet: packet.pts or 0)
            self._numbers = {packet.pts: number for number, packet in enumerate(shown)}
            self._keys = [(number, packet) for number, packet in enumerate(shown) if packet.is_key]
            # x264 writes its version into the first packet only, and FFmpeg needs it for 4:4:4 files of older
            # versions: without this call, everything after the second key frame is garbage.
            if first is not None:
                self._stream.decode(first)
            return len(shown)

    def _pictures(self, wanted: list[int]) -> dict[int, Picture]:
        """Decode the pictures `wanted` (ascending numbers); return them by number."""
        found: dict[int, Picture] = {}
        with naming(self.path):
            for key, group in groupby(wanted, self._key_before):
                found |= self._pictures_after(key, list(group))
        if len(found) < len(wanted):
            missing = [i for i in wanted if i not in found]
            raise DataError(f"{self.path}: damaged, cannot decode frames {missing}", fix=FIX)
        return found

    def _key_before(self, number: int) -> _Packet | None:
        """Return the last key frame shown no later than frame `number`, or None to begin at the start."""
        rank = bisect_right(self._keys, number, key=lambda key: key[0])
        return self._keys[rank - 1][1] if rank else None

    def _pictures_after(self, key: _Packet | None, wanted: list[int]) -> dict[int, Picture]:
        # Some containers seek by presentation timestamp, others by decoding timestamp; a seek by the wrong
        # kind may miss the key frame.
        times = (key.pts, key.dts) if key else ()
        for time in times:
            if time is not None:
                self._container.seek(time, stream=self._stream)
                found = self._collect(_from_key_frame(self._decoded(set(wanted)), wanted[0]), wanted)
                if len(found) == len(wanted):
                    return found
        return self._collect(self._from_start(set(wanted)), wanted)

    def _collect(self, decoded: Iterator[tuple[int, Any]], wanted: list[int]) -> dict[int, Picture]:
        """Collect the pictures `wanted` (ascending numbers) that were decoded without damage."""
        found: dict[int, Picture] = {}
        numbers = set(wanted)
        for number, frame in decoded:
            if number in numbers and not frame.is_corrupt:
                found[number] = _rgb(frame, self._short_side)
            if number >= wanted[-1]:
                break
        return found

    def _from_start(self, wanted: set[int] | None = None) -> Iterator[tuple[int, Any]]:
        self.close()
        self._container, self._stream = _open(self.path)
        return self._decoded(wanted)

    def _decoded(self, wanted: set[int] | None) -> Iterator[tuple[int, Any]]:
        """Yield decoded pictures with their numbers; the number is -1 if the index lacks the picture.

        Pictures that are neither wanted nor referred to by others may be left out, unless `wanted` is None.
        """
        if self._numbers is None or wanted is None:
            for count, frame in enumerate(self._container.decode(self._stream)):
                yield (count if self._numbers is None else self._numbers.get(frame.pts, -1)), frame
            return
        context = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            context.skip_frame = "DEFAULT" if self._numbers.get(packet.pts) in wanted else "NONREF"
            for frame in packet.decode():
                yield self._numbers.get(frame.pts, -1), frame


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn FFmpeg's errors within the context into a DataError that names the file."""
    import av  # imported here because it is slow to import, and only reading videos needs it

    try:
        yield
    except av.FFmpegError as error:
        raise DataError(f"{path}: not a readable video ({error.strerror})", fix=FIX) from error


def _open(path: Path) -> tuple[Any, Any]:
    """Open a file and return its container and first video stream."""
    import av

    with naming(path):
        # The path is absolute because FFmpeg reads a relative `a:b.mp4` as protocol `a`. Undecodable metadata
        # is replaced because titles in other encodings are common.
        container = av.open(str(path.absolute()), metadata_errors="replace")
    stream = next(iter(container.streams.video), None)
    if stream is None:
        container.close()
        raise DataError(f"{path}: the file has no video stream", fix=FIX)
    if stream.codec_context is None:
        container.close()
        raise DataError(f"{path}: FFmpeg has no decoder for this video", fix=FIX)
    stream.codec_context.thread_count = 1
    return container, stream


def _packets(path: Path, container: Any, stream: Any) -> tuple[list[_Packet], Any]:
    """Return the shown packets in decoding order, and the file's first packet (None if it has no packets)."""
    packets: list[_Packet] = []
    first = None
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DataError(f"{path}: cut off or damaged after {len(packets)} frames", fix=FIX)
        # An edit list discards packets, and the packet that marks the end of the file is empty.
        if packet.size and not packet.is_discard:
            packets.append(_Packet(packet.pts, packet.dts, packet.is_keyframe))
        if packet.size and first is None:
            first = packet
    return packets, first


def _timestamps_serve(container: Any, stream: Any, packets: list[_Packet]) -> bool:
    """Return whether each packet has a timestamp of its own and is one picture shown at that time."""
    times = {packet.pts for packet in packets}
    if None in times or len(times) < len(packets):
        return False
    if stream.codec_context.name == "vp8":  # some packets hold a picture that is never shown
        return False
    if container.format.name == "mpeg":  # the format has no index, so seeks land inside pictures
        return False
    # AVI stores no presentation timestamps; FFmpeg guesses them, wrongly if pictures are reordered.
    return container.format.name != "avi" or all(packet.pts == packet.dts for packet in packets)


def _from_key_frame(decoded: Iterator[tuple[int, Any]], number: int) -> Iterator[tuple[int, Any]]:
    """Yield the decoded pictures if they begin with a key frame no later than picture `number`, else none.

    After a seek that missed, the first pictures refer to pictures that were not read, or lie too late.
    """
    start = next(decoded, None)
    if start is not None and start[1].key_frame and start[0] <= number:
        yield start
        yield from decoded


class Header(NamedTuple):
    """The properties of a video file that its header and packets state.

    Attributes:
        containers: FFmpeg's names of the container format.
        codec: FFmpeg's name of the video codec.
        size: size of the stored pictures, before they are turned upright.
        has_closed_groups: True if no picture that follows a key frame is shown before it.
        frame_rate: average number of pictures per second.
    """

    containers: frozenset[str]
    codec: str
    size: Size
    has_closed_groups: bool
    frame_rate: Fraction


def probe(path: Path) -> Header:
    """Read a file's header and packets, which takes a few percent of the time needed to read a clip.

    Raises:
        DataError: if the file is not a readable video.
    """
    container, stream = _open(path)
    with container, naming(path):
        codec = stream.codec_context
        size = Size(codec.width, codec.height)
        packets, _ = _packets(path, container, stream)
        formats = frozenset(container.format.name.split(","))
        rate = stream.average_rate or Fraction(25)
        return Header(formats, codec.name, size, _has_closed_groups(packets), rate)


def find_missing_end(path: Path) -> str:
    """Describe by how much a Matroska file is shorter than its header states; return "" if it is complete.

    FFmpeg itself reports no error for a truncated Matroska file: it treats the cut as the end.

    Raises:
        DataError: if the file is not a readable video.
    """
    container, _ = _open(path)
    with container, naming(path):
        if "matroska" not in container.format.name or not container.duration:
            return ""
        packets = (packet for packet in container.demux() if packet.pts is not None)
        ends = [(packet.pts + (packet.duration or 0)) * packet.time_base for packet in packets]
        end_s, length_s = float(max(ends, default=Fraction(0))), container.duration / 1e6
    if end_s >= _LEAST_LENGTH * length_s - _LAST_FRAME_S:
        return ""
    return f"cut off; given: {end_s:.1f} s; allowed: {length_s:.1f} s, as its header states"


def _has_closed_groups(packets: list[_Packet]) -> bool:
    earliest = float("inf")  # presentation timestamp among the packets that are decoded later
    for packet in reversed(packets):
        if packet.pts is None or (packet.is_key and earliest < packet.pts):
            return False
        earliest = min(earliest, packet.pts)
    return True


def _rgb(frame: Any, short_side: int | None) -> Picture:
    """Convert a frame to RGB and turn it upright: phones store pictures sideways with a rotation flag."""
    width, height = shrunk(Size(frame.width, frame.height), short_side) or (frame.width, frame.height)
    picture: Picture = frame.to_ndarray(format="rgb24", width=width, height=height)
    return np.rot90(picture, frame.rotation // 90) if frame.rotation else picture
