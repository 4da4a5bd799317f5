"""Tests of motion vectors: the known motion of a drifting texture, by codec, reordering and orientation."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from everest_ds.data.decoding.motion import References
from everest_ds.data.decoding.open_video import open_video
from everest_ds.data.decoding.video import Motion, Need, NoMotionError, Size
from tests.data.conftest import noisy_pictures, write_video
from tests.data.decoding.odd_files import ORIENTATIONS, orient

DOWN, RIGHT = 1, 3  # pixels per picture by which `noisy_pictures` drift


def whole(size: Size) -> Need:
    return Need(range(size.height), range(size.width), 1)


def motion_of(path: Path, numbers: list[int], short_side: int | None = None) -> Motion:
    with open_video(path, short_side=short_side, with_motion=True) as video:
        motion = video.read_needed(numbers, whole).motion
    assert motion is not None
    return motion


def inner(motion: Motion, index: int) -> np.ndarray:
    """Return the median speed of a picture's inner cells, into which no new texture drifts."""
    return np.median(motion.speed[index, 1:-1, 1:-1].reshape(-1, 2), axis=0)


# A texture that drifts evenly can be predicted from any earlier picture; one reference makes it the nearest.
ONE = "ref=1:b-adapt=0"


@pytest.mark.parametrize(
    "codec, suffix, options",
    [
        ("libx264", ".mp4", {"x264-params": ONE}),
        ("libx264", ".mkv", {"bf": "2", "x264-params": f"{ONE}:b-pyramid=none"}),
        ("libx264", ".mp4", {"bf": "3", "x264-params": f"{ONE}:b-pyramid=normal"}),
        ("mpeg4", ".avi", {}),
        ("mpeg4", ".mp4", {}),
        ("mpeg2video", ".ts", {"bf": "2"}),
        ("h263", ".avi", {"size": "352x288"}),
        ("wmv2", ".avi", {}),
    ],
)
def test_the_drift_of_a_texture_is_read_from_every_codec(
    codec: str, suffix: str, options: dict[str, Any], tmp_path: Path
) -> None:
    width, height = map(int, options.pop("size", "160x128").split("x"))
    pictures = noisy_pictures(16, height, width) if height < 192 else drifting(16, height, width)
    path = write_video(tmp_path / f"a{suffix}", pictures, codec, g="8", **options)
    motion = motion_of(path, list(range(16)))
    assert motion.speed.shape == (16, -(-height // 16), -(-width // 16), 2) and motion.cell == 16
    still = [index for index in range(16) if not motion.speed[index].any()]
    assert len(still) <= 3 and motion.number.tolist() == list(range(16))  # key frames
    for index in set(range(16)) - set(still):
        np.testing.assert_allclose(inner(motion, index), (DOWN, RIGHT), atol=0.3, err_msg=str(index))


def drifting(count: int, height: int, width: int) -> list[np.ndarray]:
    """Return pictures of the same drift, from a larger texture."""
    texture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    return [np.ascontiguousarray(np.roll(texture, (i, 3 * i), (0, 1))[:height, :width]) for i in range(count)]


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_motion_turns_and_shrinks_with_the_picture(name: str, tmp_path: Path) -> None:
    corner, shown = ORIENTATIONS[name]
    pictures = drifting(8, 72, 120)
    for picture in pictures:
        picture[:, 48:] = pictures[0][:, 48:]  # only the left part moves
    options: dict[str, Any] = {"x264-params": ONE}
    path = orient(write_video(tmp_path / "a.mp4", pictures, g="8", **options), corner)
    motion = motion_of(path, [3, 4, 6], short_side=36)
    assert motion.cell == 8
    marks = np.zeros((2, 72, 120, 1), np.uint8)
    marks[0, 30, 30] = marks[1, 30 + DOWN, 30 + RIGHT] = 1
    before, after = (np.argwhere(shown(mark))[0][:2] for mark in marks)
    moves = shown(np.repeat((np.arange(120) < 48)[None, :, None], 72, axis=0))[..., 0]
    for row, column in np.ndindex(motion.speed.shape[1:3]):
        y, x = (2 * (edge + 8 * at) for edge, at in ((motion.top, row), (motion.left, column)))
        inside = moves[round(max(y, 0)) : round(y + 16), round(max(x, 0)) : round(x + 16)]
        speed = np.median(motion.speed[:, row, column], axis=0)
        if inside.all() and inside.shape == (16, 16):
            np.testing.assert_allclose(speed, (after - before) / 2, atol=0.3)
        elif not inside.any():
            np.testing.assert_allclose(speed, 0, atol=0.1)


def test_pictures_are_the_same_with_and_without_motion(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", noisy_pictures(16), g="8", bf="2")
    with open_video(path, with_motion=True) as video, open_video(path) as plain:
        moving, still = video.read_needed([2, 7, 7, 11], whole), plain.read_needed([2, 7, 7, 11], whole)
    assert np.array_equal(moving.pixels, still.pixels) and still.motion is None
    assert moving.motion is not None and np.array_equal(moving.motion.speed[1], moving.motion.speed[2])


@pytest.mark.parametrize(
    "codec, suffix, options, reason",
    [
        ("libvpx-vp9", ".webm", {}, "codec vp9"),
        ("libx265", ".mp4", {"x265-params": "log-level=none"}, "codec hevc"),
        ("mjpeg", ".avi", {"pix_fmt": "yuvj420p"}, "codec mjpeg"),
        ("libx264", ".mp4", {"g": "1"}, "every picture is intra-coded"),
    ],
)
def test_a_stream_without_vectors_is_refused_by_name(
    codec: str, suffix: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    path = write_video(tmp_path / f"a{suffix}", noisy_pictures(8), codec, **options)
    with pytest.raises(NoMotionError, match=rf"a{suffix}: no motion vectors; .*{reason}.*score=pixel"):
        open_video(path, with_motion=True)


@pytest.mark.parametrize(
    "shown, distances",
    [
        ("I0 P1 P2 P3", {1: (1, 1), 3: (1, 1)}),
        # decoded I P B B P B B: both B pictures refer to the P pictures around them
        ("I0 B2 B3 P1 B5 B6 P4", {3: (3, 1), 1: (1, 2), 2: (2, 1), 4: (1, 2), 5: (2, 1), 6: (3, 1)}),
        # decoded I P B b b: the B in the middle is a reference of those beside it
        ("I0 b3 B2 b4 P1", {4: (4, 1), 2: (2, 2), 1: (1, 1), 3: (1, 1)}),
    ],
)
def test_references_follow_from_the_order_of_decoding(
    shown: str, distances: dict[int, tuple[int, int]]
) -> None:
    references = References([int(picture[1:]) for picture in shown.split()])
    assert {number: references.distances(number) for number in distances} == distances


def test_frames_are_freed_at_once(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", noisy_pictures(16), g="8")
    gc.collect()
    gc.disable()
    try:
        motion_of(path, list(range(16)))
        kept = [each for each in gc.get_objects() if isinstance(each, av.VideoFrame)]
    finally:
        gc.enable()
    assert not kept
