"""Exact decoding of any file that FFmpeg reads, through PyAV.

Pictures are numbered in the order in which they are shown. Opening a file reads its packets without decoding
them; a read then seeks to key frames and recognises the wanted pictures by their timestamps, or, in a file
without reliable timestamps, decodes from the beginning and counts. Each video uses one decoding thread,
because loaders run many processes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from everest_ds.data.decoding.motion import CODECS_WITH_VECTORS, MotionReader, export_vectors
from everest_ds.data.decoding.orientation import Picture
from everest_ds.data.decoding.to_rgb import Cutout, RgbConverter, part_with
from everest_ds.data.decoding.video import FIX, Need, NoMotionError, Pictures, Size, Video, in_parts
from everest_ds.errors import DataError

# An intact file may be a little shorter than its header states. It has at least this share of the stated
# length, less the duration of the last frame, which some files do not state.
_LEAST_LENGTH, _LAST_FRAME_S = 0.95, 0.1
_PartOf = Callable[[Size], Cutout] | None


class Packet(NamedTuple):
    """The times of one packet, and whether decoding can begin at it."""

    pts: int | None  # presentation timestamp
    dts: int | None  # decoding timestamp
    is_key: bool


class PyAVVideo(Video):
    """A video file opened with PyAV; see `decoding.open_video`."""

    def __init__(self, path: Path, short_side: int | None = None, with_motion: bool = False) -> None:
        self.path = path
        self._to_rgb = RgbConverter(short_side)
        self._with_motion = with_motion
        self._motion: MotionReader | None = None
        self._container, self._stream = self._open()
        try:
            self.num_frames = self._index()
            if self.num_frames == 0:
                raise DataError(f"{path}: the video holds no picture", fix=FIX)
            if with_motion:
                self._check_motion()
                self._motion = MotionReader(self._order)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file and free the decoder."""
        self._container.close()

    def read_needed(self, indices: Sequence[int], need: Callable[[Size], Need]) -> Pictures:
        """Decode the pictures `indices`, and convert only the part of them that `need` names to RGB.

        Raises:
            DataError: as `read`.
        """
        self._check_range(indices)
        parts: dict[Size, Cutout] = {}

        def part_of(size: Size) -> Cutout:
            if size not in parts:
                parts[size] = part_with(need(size), size)
            return parts[size]

        pixels = self._joined(self._pictures(sorted(set(indices)), part_of), indices)
        self._check_sizes(list(parts))
        [(size, part)] = parts.items()
        motion = self._motion.take(indices, self._placement) if self._motion else None
        return Pictures(pixels, size, 1, part.rows.start, part.columns.start, motion)

    def read_all(self, every: int = 1) -> Iterator[torch.Tensor]:
        """Decode as `Video.read_all` does, in one pass over the file."""
        indices = range(0, self.num_frames, every)
        with naming(self.path):
            decoded = self._from_start(set(indices))
            for part in in_parts(indices):
                found = self._collect(decoded, list(part))
                yield self._joined(self._all_of(found, part), part)

    def _read(self, indices: Sequence[int]) -> torch.Tensor:
        return self._joined(self._pictures(list(indices)), indices)

    def _check_motion(self) -> None:
        codec = self._stream.codec_context.name
        if codec not in CODECS_WITH_VECTORS:
            raise NoMotionError(self.path, f"the codec {codec}, whose vectors FFmpeg does not export")
        # Other codecs may mark every packet as a key frame.
        if codec == "h264" and len(self._keys) == self.num_frames > 1:
            raise NoMotionError(self.path, "a video in which every picture is intra-coded")

    def _joined(self, pictures: dict[int, Picture], indices: Sequence[int]) -> torch.Tensor:
        self._check_sizes([Size(picture.shape[1], picture.shape[0]) for picture in pictures.values()])
        return torch.from_numpy(np.stack([pictures[i] for i in indices]))

    def _check_sizes(self, sizes: Sequence[Size]) -> None:
        if len(set(sizes)) > 1:
            given = [f"{size.width}x{size.height}" for size in sorted(set(sizes))]
            raise DataError(f"{self.path}: the picture size changes within the video", given=given, fix=FIX)

    def _index(self) -> int:
        """Index the pictures by timestamp and key frame, and return their number."""
        with naming(self.path):
            packets, first, _ = read_packets(self.path, self._container, self._stream)
            self._numbers: dict[int | None, int] | None = None  # by timestamp, if reliable
            self._keys: list[tuple[int, Packet]] = []
            self._order: list[int] | None = None  # place in decoding order, by number
            if not _timestamps_serve(self._container, self._stream, packets):
                return sum(1 for _ in self._from_start())
            self._order = sorted(range(len(packets)), key=lambda place: packets[place].pts or 0)
            shown = [packets[place] for place in self._order]
            self._numbers = {packet.pts: number for number, packet in enumerate(shown)}
            self._keys = [(number, packet) for number, packet in enumerate(shown) if packet.is_key]
            # x264 writes its version into the first packet only, and FFmpeg needs it for 4:4:4 files of older
            # versions: without this call, everything after the second key frame is garbage. H.264 keeps the
            # version even if the picture itself is skipped.
            if first is not None:
                context = self._stream.codec_context
                context.skip_frame = "ALL" if context.name == "h264" else "DEFAULT"
                self._stream.decode(first)
            return len(shown)

    def _pictures(self, wanted: list[int], part_of: _PartOf = None) -> dict[int, Picture]:
        """Decode the pictures `wanted` (ascending numbers); return them by number."""
        found: dict[int, Picture] = {}
        with naming(self.path):
            for key, group in groupby(wanted, self._key_before):
                found |= self._pictures_after(key, list(group), part_of)
        return self._all_of(found, wanted)

    def _all_of(self, found: dict[int, Picture], wanted: Sequence[int]) -> dict[int, Picture]:
        """Return the pictures `found`, which must be those `wanted`."""
        if len(found) < len(wanted):
            missing = [i for i in wanted if i not in found]
            raise DataError(f"{self.path}: damaged, cannot decode frames {missing}", fix=FIX)
        return found

    def _key_before(self, number: int) -> Packet | None:
        """Return the last key frame shown no later than frame `number`, or None to begin at the start."""
        rank = bisect_right(self._keys, number, key=lambda key: key[0])
        return self._keys[rank - 1][1] if rank else None

    def _pictures_after(self, key: Packet | None, wanted: list[int], part_of: _PartOf) -> dict[int, Picture]:
        # Some containers seek by presentation timestamp, others by decoding timestamp; a seek by the wrong
        # kind may miss the key frame.
        times = (key.pts, key.dts) if key else ()
        for time in times:
            if time is not None:
                self._container.seek(time, stream=self._stream)
                decoded = _from_key_frame(self._decoded(set(wanted)), wanted[0])
                found = self._collect(decoded, wanted, part_of)
                if len(found) == len(wanted):
                    return found
        return self._collect(self._from_start(set(wanted)), wanted, part_of)

    def _collect(
        self, decoded: Iterator[tuple[int, Any]], wanted: list[int], part_of: _PartOf = None
    ) -> dict[int, Picture]:
        """Collect the pictures `wanted` (ascending numbers) that were decoded without damage."""
        found: dict[int, Picture] = {}
        numbers = set(wanted)
        for number, frame in decoded:
            if number in numbers and not frame.is_corrupt:
                found[number] = self._rgb(frame, part_of)
                if self._motion:
                    self._motion.note(number, frame)
                    self._placement = self._to_rgb.placement(frame)
            if number >= wanted[-1]:
                break
        return found

    def _rgb(self, frame: Any, part_of: _PartOf) -> Picture:
        try:
            return self._to_rgb.convert(frame, part_of)
        except DataError as error:
            raise DataError(f"{self.path}: {error}") from None

    def _from_start(self, wanted: set[int] | None = None) -> Iterator[tuple[int, Any]]:
        self.close()
        self._container, self._stream = self._open()
        return self._decoded(wanted)

    def _open(self) -> tuple[Any, Any]:
        container, stream = open_stream(self.path)
        if self._with_motion:
            export_vectors(stream)
        return container, stream

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


def open_stream(path: Path) -> tuple[Any, Any]:
    """Open a file and return its container and first video stream."""
    import av

    with naming(path):
        # The path is absolute because FFmpeg reads a relative `a:b.mp4` as protocol `a`. Undecodable metadata
        # is replaced because titles in other encodings are common.
        # FFmpeg decodes a few pictures to learn their order, and their quality does not matter there. The
        # decoder of the stream, which decodes the wanted pictures, does not have this option.
        fast = {"skip_loop_filter": "all"}
        container = av.open(str(path.absolute()), metadata_errors="replace", options=fast)
    stream = next(iter(container.streams.video), None)
    if stream is None:
        container.close()
        raise DataError(f"{path}: the file has no video stream", fix=FIX)
    if stream.codec_context is None:
        container.close()
        raise DataError(f"{path}: FFmpeg has no decoder for this video", fix=FIX)
    stream.codec_context.thread_count = 1
    return container, stream


class Packets(NamedTuple):
    """The packets of a video stream.

    Attributes:
        shown: those that are shown, in decoding order.
        first: the file's first packet, as PyAV has it; None if there are no packets.
        num_discarded: number of packets that an edit list discards.
    """

    shown: list[Packet]
    first: Any
    num_discarded: int


def read_packets(path: Path, container: Any, stream: Any) -> Packets:
    """Read all packets of a stream without decoding them.

    Raises:
        DataError: if the file is cut off or damaged.
    """
    packets: list[Packet] = []
    first, num_discarded = None, 0
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise DataError(f"{path}: cut off or damaged after {len(packets)} frames", fix=FIX)
        # An edit list discards packets, and the packet that marks the end of the file is empty.
        num_discarded += packet.is_discard
        if packet.size and not packet.is_discard:
            packets.append(Packet(packet.pts, packet.dts, packet.is_keyframe))
        if packet.size and first is None:
            first = packet
    return Packets(packets, first, num_discarded)


def _timestamps_serve(container: Any, stream: Any, packets: list[Packet]) -> bool:
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


def find_missing_end(path: Path) -> str:
    """Describe by how much a Matroska file is shorter than its header states; return "" if it is complete.

    FFmpeg itself reports no error for a truncated Matroska file: it treats the cut as the end.

    Raises:
        DataError: if the file is not a readable video.
    """
    container, _ = open_stream(path)
    with container, naming(path):
        if "matroska" not in container.format.name or not container.duration:
            return ""
        packets = (packet for packet in container.demux() if packet.pts is not None)
        ends = [(packet.pts + (packet.duration or 0)) * packet.time_base for packet in packets]
        end_s, length_s = float(max(ends, default=Fraction(0))), container.duration / 1e6
    if end_s >= _LEAST_LENGTH * length_s - _LAST_FRAME_S:
        return ""
    return f"cut off; given: {end_s:.1f} s; allowed: {length_s:.1f} s, as its header states"
