"""Videos to test with: real clips where they lie beside the repository, and one drawn here."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

REAL_VIDEOS = Path(__file__).parents[3] / "shared" / "data" / "videos"


def write_video(path: Path, pictures: list[np.ndarray], codec: str = "libx264", **options: str) -> Path:
    """Write RGB `pictures` (H, W, 3), uint8, at 25 frames a second."""
    height, width, _ = pictures[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.max_b_frames = int(options.get("bf", 0))
        stream.codec_context.gop_size = int(options.get("g", 12))
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="session")
def real_videos() -> Path:
    """The folder of the real clips."""
    if not REAL_VIDEOS.is_dir():
        pytest.skip(f"needs the real clips in {REAL_VIDEOS}")
    return REAL_VIDEOS


@pytest.fixture
def synthetic_video(tmp_path: Path) -> Path:
    """H.264 with reordered pictures and a key frame every 8: 24 frames, 64x64, frame i all of gray 10 * i."""
    pictures = [np.full((64, 64, 3), 10 * i, np.uint8) for i in range(24)]
    return write_video(tmp_path / "gray.mp4", pictures, g="8", bf="2")
