"""A generator of odd video files: formats, sizes, edit lists, tracks, fields and orientations."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.data.conftest import freed_encoders, noisy_pictures, write_video

Make = Callable[[Path], Path]
_UPRIGHT = (1, 0, 0, 1)
# The upper left corner (a, b, c, d) of a display matrix, and what it does to a picture (H, W, 3).
ORIENTATIONS: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "upright": (_UPRIGHT, lambda p: p),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    "upside down": ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    "flipped": ((1, 0, 0, -1), lambda p: p[::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    "anti-transposed": ((0, -1, -1, 0), lambda p: np.rot90(p, 2).transpose(1, 0, 2)),
    "counter-clockwise": ((0, -1, 1, 0), lambda p: np.rot90(p)),
}


@dataclass(frozen=True)
class OddFile:
    """A file to make: its name, and the function that writes it into a folder."""

    name: str
    make: Make

    def __str__(self) -> str:
        return self.name


def orient(path: Path, corner: tuple[float, float, float, float]) -> Path:
    """Edit an MP4 file's track header to hold a display matrix with this upper left corner."""
    a, b, c, d = (round(value * 65536) for value in corner)
    stated, wanted = (
        b"".join(n.to_bytes(4, "big", signed=True) for n in (*row, 0, 0, 1 << 30))
        for row in ((65536, 0, 0, 0, 65536, 0), (a, b, 0, c, d, 0))
    )
    data = path.read_bytes()
    track = data.index(b"tkhd")
    assert stated in data[track:]
    path.write_bytes(data[:track] + data[track:].replace(stated, wanted, 1))
    return path


def cut(folder: Path, first_shown: int, suffix: str = ".mp4", **options: Any) -> Path:
    """Cut a file without encoding it again: what precedes `first_shown` is discarded by an edit list."""
    whole = write_video(folder / "whole.mp4", noisy_pictures(30), g="10", **options)
    path = folder / f"cut{suffix}"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        offset = int(Fraction(first_shown, 25) / stream.time_base)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - offset, packet.dts - offset
                packet.stream = copy
                target.mux(packet)
    return path


def late(folder: Path, suffix: str) -> Path:
    """Write a file whose first picture is shown two seconds after its beginning."""
    times = list(range(50, 70))
    return write_video(folder / f"late{suffix}", noisy_pictures(20), times=times, g="6", bf="2")


@freed_encoders()
def two_tracks(folder: Path) -> Path:
    """Write a file with two video tracks of different pictures."""
    path = folder / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=25, options={"g": "6"}) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for number, picture in enumerate(noisy_pictures(20)):
            for stream, shown in zip(streams, (picture, 255 - picture), strict=True):
                frame = av.VideoFrame.from_ndarray(shown, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    return path


def oriented(folder: Path, corner: tuple[float, float, float, float]) -> tuple[Path, Path]:
    """Write a file of pictures without symmetry, and a copy of it that states another orientation."""
    stored = write_video(folder / "stored.mp4", noisy_pictures(12, 64, 112), g="6")
    return stored, orient(Path(shutil.copy(stored, folder / "turned.mp4")), corner)


_FIELDS = "+ildct+ilme"  # flags of interlaced pictures


def _encoded(
    name: str, suffix: str, codec: str, size: tuple[int, int] = (96, 128), **options: Any
) -> OddFile:
    def make(folder: Path) -> Path:
        settings: dict[str, Any] = {"g": "6", **options}
        return write_video(folder / f"clip{suffix}", noisy_pictures(20, *size), codec, **settings)

    return OddFile(name, make)


def _formats() -> Iterator[OddFile]:
    ten_bits = ("yuv420p10le", "yuv422p10le")
    for codec, suffixes, formats in (
        (
            "libx264",
            (".mp4", ".mkv", ".mov"),
            ("yuv420p", "yuv422p", "yuv444p", "yuvj420p", *ten_bits, "gray"),
        ),
        ("libx265", (".mp4",), ("yuv420p", "yuv444p", "yuv420p10le")),
        ("libvpx-vp9", (".mp4", ".webm"), ("yuv420p", "yuv422p", "yuv444p", "gbrp")),
        ("libsvtav1", (".mp4",), ("yuv420p", "yuv420p10le")),
        ("mpeg4", (".mp4", ".avi"), ("yuv420p",)),
        ("mpeg2video", (".mpg", ".mov"), ("yuv420p", "yuv422p")),
        ("mjpeg", (".avi", ".mov"), ("yuvj420p", "yuvj422p")),
        ("ffv1", (".mkv",), ("yuv420p", "yuv444p", "bgr0")),
        ("prores_ks", (".mov",), ("yuv422p10le",)),
    ):
        for suffix in suffixes:
            for pix_fmt in formats:
                if (codec, suffix, pix_fmt) == ("mpeg2video", ".mpg", "yuv422p"):
                    continue  # PyAV cannot write it
                yield _encoded(f"{codec} {pix_fmt} in {suffix}", suffix, codec, pix_fmt=pix_fmt)


def _params(text: str) -> dict[str, Any]:
    return {"x264-params": text}  # no name of a Python argument


def odd_files() -> list[OddFile]:
    """Return all odd files, whose pictures are those that sequential decoding gives."""
    x264 = partial(_encoded, suffix=".mp4", codec="libx264")
    return [
        *_formats(),
        x264("open groups", bf="2", **_params("open-gop=1")),
        x264("many reordered pictures", bf="5", **_params("b-adapt=0:bframes=5:b-pyramid=strict")),
        x264("interlaced, top field first", flags=_FIELDS, **_params("tff=1")),
        x264("interlaced, bottom field first", flags=_FIELDS, **_params("bff=1")),
        x264("pictures marked as interlaced", **_params("fake-interlaced=1")),
        *(
            x264(f"size {w}x{h}", size=(h, w))
            for w, h in ((16, 16), (48, 64), (66, 34), (130, 98), (1024, 16))
        ),
        *(x264(f"odd size {w}x{h}", size=(h, w), pix_fmt="yuv444p") for w, h in ((75, 101), (33, 17))),
        _encoded("odd size 101x75, VP9", ".webm", "libvpx-vp9", size=(75, 101)),
        *(OddFile(f"cut before picture {n}", partial(cut, first_shown=n)) for n in (1, 7, 13, 25)),
        OddFile("cut, reordered", partial(cut, first_shown=17, bf="2")),
        OddFile("cut in a MOV", partial(cut, first_shown=7, suffix=".mov")),
        OddFile("a late start in an MP4", partial(late, suffix=".mp4")),
        OddFile("a late start in a MKV", partial(late, suffix=".mkv")),
        OddFile("a late start in a transport stream", partial(late, suffix=".ts")),
        OddFile("two video tracks", two_tracks),
    ]
