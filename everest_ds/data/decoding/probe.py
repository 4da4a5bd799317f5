"""The probe of a video file: the properties by which it is decided which decoder reads the file exactly."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from everest_ds.data.decoding.orientation import IDENTITY, display_matrix
from everest_ds.data.decoding.pyav import Packet, Packets, naming, open_stream, read_packets
from everest_ds.data.decoding.video import Size

# The pixel formats whose pictures every decoder converts to the same RGB values, as found by the tests.
_COMMON_FORMATS = frozenset({"yuv420p", "yuv422p", "yuv444p"})
_FULL_RANGE = 2  # FFmpeg's AVCOL_RANGE_JPEG
_PROGRESSIVE = (0, 1)  # FFmpeg's field orders "unknown" and "progressive"


class Header(NamedTuple):
    """The properties of a video file that its header and packets state.

    Attributes:
        containers: FFmpeg's names of the container format.
        codec: FFmpeg's name of the video codec.
        size: size of the stored pictures, before they are turned upright.
        has_closed_groups: True if no picture that follows a key frame is shown before it.
        oddities: what the file has that other decoders than PyAV are known, or may be feared, to get wrong.
        frame_rate: average number of pictures per second.
    """

    containers: frozenset[str]
    codec: str
    size: Size
    has_closed_groups: bool
    oddities: frozenset[str]
    frame_rate: Fraction


def probe(path: Path) -> Header:
    """Read a file's header and packets, and decode its first picture.

    This takes a few percent of the time needed to read a clip.

    Raises:
        DataError: if the file is not a readable video.
    """
    container, stream = open_stream(path)
    with container, naming(path):
        codec = stream.codec_context
        size = Size(codec.width, codec.height)
        packets = read_packets(path, container, stream)
        formats = frozenset(container.format.name.split(","))
        rate = stream.average_rate or Fraction(25)
        oddities = frozenset(_oddities(container, stream, packets))
        return Header(formats, codec.name, size, _has_closed_groups(packets.shown), oddities, rate)


def _oddities(container: Any, stream: Any, packets: Packets) -> frozenset[str]:
    codec, picture = stream.codec_context, _first_picture(container, stream)
    progressive = getattr(codec, "field_order", 0) in _PROGRESSIVE
    found = {
        "an edit list": packets.num_discarded > 0,
        "several video tracks": len(container.streams.video) > 1,
        f"pixel format {codec.pix_fmt}": codec.pix_fmt not in _COMMON_FORMATS,
        "full-range colours": codec.color_range == _FULL_RANGE,
        "a late start": bool(stream.start_time),
        "a damaged first picture": picture is None,
        "a display matrix": picture is not None and display_matrix(picture) != IDENTITY,
        "interlaced pictures": picture is not None and (picture.interlaced_frame or not progressive),
    }
    return frozenset(name for name, there in found.items() if there)


def _first_picture(container: Any, stream: Any) -> Any:
    import av

    with suppress(av.FFmpegError):
        container.seek(0)
        return next(container.decode(stream), None)
    return None


def _has_closed_groups(packets: list[Packet]) -> bool:
    earliest = float("inf")  # presentation timestamp among the packets that are decoded later
    for packet in reversed(packets):
        if packet.pts is None or (packet.is_key and earliest < packet.pts):
            return False
        earliest = min(earliest, packet.pts)
    return True
