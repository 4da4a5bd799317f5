"""Test videos: real clips, if they lie beside the repository, and synthetic ones that are encoded here."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest

REAL_VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"


# The rotation matrix of an MP4 track header, by angle: numbers in 16.16 fixed point, the last one in 2.30.
TURNS = {
    0: (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30),
    90: (0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30),
}


def all_frames(path: Path) -> np.ndarray:
    """Decode every picture in order, without seeking."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def noisy_pictures(count: int, height: int = 96, width: int = 128) -> list[np.ndarray]:
    """Draw pictures of a drifting texture, which all differ and which a codec predicts from one another."""
    texture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.ascontiguousarray(np.roll(texture, (i, 3 * i), (0, 1))[:height, :width]) for i in range(count)]


def lay_down(path: Path) -> None:
    """Edit an MP4 file to state that its pictures must be turned by 90 degrees to be upright."""
    matrix = {
        angle: b"".join(n.to_bytes(4, "big", signed=True) for n in turn) for angle, turn in TURNS.items()
    }
    data = path.read_bytes()
    track = data.index(b"tkhd")  # the track's header follows that of the whole file
    path.write_bytes(data[:track] + data[track:].replace(matrix[0], matrix[90], 1))


@contextmanager
def freed_encoders() -> Iterator[None]:
    """Free the encoders of a function when it returns, although PyAV keeps them in circles of references.

    An encoder has threads. If a forked worker inherited one, its garbage collection would wait for threads
    that it does not have.
    """
    gc.disable()  # keeps what the function makes in the youngest generation, whose collection is fast
    try:
        yield
    finally:
        gc.enable()
        gc.collect(0)


@freed_encoders()
def write_video(
    path: Path,
    pictures: list[np.ndarray],
    codec: str = "libx264",
    times: list[int] | None = None,
    pix_fmt: str = "yuv420p",
    header: dict[str, str] | None = None,
    **options: str,
) -> Path:
    """Write RGB `pictures` (H, W, 3), uint8, at `times` in 25ths of a second (default: consecutive).

    Args:
        path: the file to write; its suffix names the container.
        pictures: the pictures to encode.
        codec: FFmpeg's name of the encoder.
        times: presentation time of each picture.
        pix_fmt: FFmpeg's name of the pixel format.
        header: options of the container.
        **options: options of the encoder.
    """
    height, width, _ = pictures[0].shape
    with av.open(str(path), "w", options=header) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.max_b_frames = int(options.get("bf", 0))
        stream.codec_context.gop_size = int(options.get("g", 12))
        for time, picture in zip(times or range(len(pictures)), pictures, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """The folder of the real clips; a test that needs it is skipped if it does not exist."""
    if not REAL_VIDEOS.is_dir():
        pytest.skip(f"needs the real clips in {REAL_VIDEOS}")
    return REAL_VIDEOS


@pytest.fixture
def synthetic_video(tmp_path: Path) -> Path:
    """An H.264 file of 24 reordered 64x64 frames: key frames every 8 frames, grey level 10 * i in frame i."""
    pictures = [np.full((64, 64, 3), 10 * i, np.uint8) for i in range(24)]
    return write_video(tmp_path / "gray.mp4", pictures, g="8", bf="2")
