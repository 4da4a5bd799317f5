"""Tests of the decoders: all return the same frames of every kind of file and refuse files without frames."""

from __future__ import annotations

import multiprocessing
import random
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from everest_ds.config import DataConfig
from everest_ds.config.schema import DECODERS
from everest_ds.data.decoding.open_video import open_sample, open_video, require_decoder
from everest_ds.data.decoding.video import Need, Video
from everest_ds.data.video_list import Sample
from everest_ds.errors import ConfigError, DataError
from tests.data.conftest import all_frames, lay_down, noisy_pictures, write_video

UNEVEN = [0, 1, 2, 7, 8, 9, 30, 31, 50, 51, 52, 100, 101, 102, 110, 111, 130, 131, 132, 133]
REAL = (
    "balle1-vp9.avi",
    "bikes.mp4",
    "carphone_pristine.mp4",
    "Principe_inertie.avi",
    "Effet_force_magnetique.ogv",
)


@pytest.fixture(params=DECODERS)
def decoder(request: pytest.FixtureRequest) -> str:
    """The name of an installed decoder; the test is skipped for other decoders."""
    try:
        require_decoder(request.param)
    except ConfigError as error:
        pytest.skip(str(error))
    return str(request.param)


def uneven_mp4(folder: Path) -> Path:
    return write_video(folder / "uneven.mp4", noisy_pictures(20), times=UNEVEN, g="6", bf="2")


def uneven_webm(folder: Path) -> Path:
    return write_video(folder / "uneven.webm", noisy_pictures(20), "libvpx-vp9", times=UNEVEN, g="6")


def open_gop_h264(folder: Path) -> Path:
    options: dict[str, Any] = {"g": "6", "bf": "2", "x264-params": "open-gop=1"}
    return write_video(folder / "open.mp4", noisy_pictures(20), **options)


def odd_h264(folder: Path) -> Path:
    return write_video(folder / "odd.mp4", noisy_pictures(20, 75, 101), pix_fmt="yuv444p", g="6", bf="2")


def odd_vp9(folder: Path) -> Path:
    return write_video(folder / "odd.webm", noisy_pictures(20, 75, 101), "libvpx-vp9", g="6")


def narrow_h264(folder: Path) -> Path:
    return write_video(folder / "narrow.mp4", noisy_pictures(20, 64, 48), g="6")


def hevc_mp4(folder: Path) -> Path:
    return write_video(folder / "hevc.mp4", noisy_pictures(20), "libx265", g="6", bf="2")


def vp9_mp4(folder: Path) -> Path:
    return write_video(folder / "vp9.mp4", noisy_pictures(20), "libvpx-vp9", g="6")


def av1_mp4(folder: Path) -> Path:
    return write_video(folder / "av1.mp4", noisy_pictures(20), "libsvtav1", g="6")


def mpeg4_avi(folder: Path) -> Path:
    return write_video(folder / "xvid.avi", noisy_pictures(20), "mpeg4", g="6")


def mpeg4_mp4(folder: Path) -> Path:
    return write_video(folder / "mpeg4.mp4", noisy_pictures(20), "mpeg4", g="6", bf="2")


def vp8_webm(folder: Path) -> Path:
    return write_video(folder / "vp8.webm", noisy_pictures(20), "libvpx", g="6")


def single_mp4(folder: Path) -> Path:
    return write_video(folder / "single.mp4", noisy_pictures(1))


def wrong_name(folder: Path) -> Path:
    return write_video(folder / "a.webm", noisy_pictures(20), "libvpx-vp9", g="6").rename(folder / "a.mp4")


KINDS = (
    *(uneven_mp4, uneven_webm, open_gop_h264, odd_h264, odd_vp9, narrow_h264),
    *(hevc_mp4, vp9_mp4, av1_mp4, mpeg4_avi, mpeg4_mp4, vp8_webm, single_mp4, wrong_name),
)


def assert_exact(path: Path, decoder: str) -> None:
    """Assert that random reads equal sequential decoding."""
    expected = all_frames(path)
    rng = random.Random(0)
    with open_video(path, decoder) as video:
        assert video.num_frames == len(expected)
        for count in (1, 5, 12):
            indices = [rng.randrange(len(expected)) for _ in range(count)]
            np.testing.assert_array_equal(video.read(indices).numpy(), expected[indices])
            assert_part_exact(video, indices, expected, rng)


def assert_part_exact(video: Video, indices: list[int], expected: np.ndarray, rng: random.Random) -> None:
    """Assert that a random part of the pictures, read alone, equals that part of the whole pictures."""
    height, width = expected.shape[1:3]
    rows = range(*sorted(rng.sample(range(height + 1), 2)))
    columns = range(*sorted(rng.sample(range(width + 1), 2)))
    found = video.read_needed(indices, lambda size: Need(rows, columns, 1))
    assert found.size == (width, height)
    top, left = rows.start - found.top, columns.start - found.left
    part = found.pixels[:, top : top + len(rows), left : left + len(columns)].numpy()
    wanted = expected[indices][:, rows.start : rows.stop, columns.start : columns.stop]
    np.testing.assert_array_equal(part, wanted)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_frames_of_every_kind_equal_sequential_decoding(tmp_path: Path, make: object, decoder: str) -> None:
    assert_exact(make(tmp_path), decoder)  # type: ignore[operator]


@pytest.mark.parametrize("name", REAL)
def test_frames_of_real_clips_equal_sequential_decoding(real_videos: Path, name: str, decoder: str) -> None:
    assert_exact(real_videos / name, decoder)


def test_a_video_stored_lying_comes_upright_also_shrunk(tmp_path: Path, decoder: str) -> None:
    path = write_video(tmp_path / "lying.mp4", noisy_pictures(6))
    stored = all_frames(path)
    lay_down(path)
    with open_video(path, decoder) as video:
        np.testing.assert_array_equal(video.read([4, 1]).numpy(), np.rot90(stored[[4, 1]], -1, (1, 2)))
    with open_video(path, decoder, short_side=48) as video:
        assert video.read([4]).shape == (1, 64, 48, 3)


@pytest.mark.parametrize("make", [uneven_mp4, odd_vp9, mpeg4_avi], ids=lambda make: make.__name__)
def test_shrunk_frames_are_the_same_from_every_decoder(tmp_path: Path, make: object, decoder: str) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    with open_video(path, decoder, short_side=48) as video, open_video(path, "pyav", short_side=48) as other:
        frames, expected = video.read([19, 3, 3]), other.read([19, 3, 3])
    assert min(frames.shape[1:3]) == 48 and frames.shape == expected.shape
    np.testing.assert_array_equal(frames.numpy(), expected.numpy())
    with open_video(path, decoder, short_side=500) as video:
        assert video.read([0]).shape[1:3] == open_video(path).read([0]).shape[1:3]


def test_a_video_without_pictures_is_refused(tmp_path: Path, decoder: str) -> None:
    write_video(tmp_path / "some.mp4", noisy_pictures(2))
    with av.open(str(tmp_path / "some.mp4")) as some, av.open(str(tmp_path / "none.mp4"), "w") as none:
        none.add_stream_from_template(some.streams.video[0])
        none.start_encoding()
    with pytest.raises(DataError, match=r"none\.mp4: the (video holds no picture|file has no video stream)"):
        open_video(tmp_path / "none.mp4", decoder)


def test_a_part_of_a_video_counts_from_its_own_beginning(synthetic_video: Path, decoder: str) -> None:
    data = DataConfig.model_validate({"decoder": decoder, "decode_short_side": 32})
    with open_sample(Sample(synthetic_video, None, (8, 20)), data) as part:
        assert part.num_frames == 12
        grays = part.read([0, 11]).float().mean(dim=(1, 2, 3)) / 10
        assert [round(gray) for gray in grays.tolist()] == [8, 19]
        with pytest.raises(DataError, match=r"given: \[12\]; allowed: 0\.\.11"):
            part.read([12])


def test_a_decoder_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchcodec", None)
    with pytest.raises(ConfigError, match=r"data\.decoder=torchcodec.*pip install"):
        require_decoder("torchcodec")


def test_a_forked_worker_decodes_what_its_parent_has_open(synthetic_video: Path, decoder: str) -> None:
    with open_video(synthetic_video, decoder) as video, multiprocessing.get_context("fork").Pool(1) as pool:
        here = video.read([7, 20])
        there = pool.apply_async(first_values, (synthetic_video, decoder)).get(timeout=60)
        assert there == here[:, 0, 0, 0].tolist() == video.read([7, 20])[:, 0, 0, 0].tolist()


def first_values(path: Path, decoder: str) -> list[int]:
    """Return the first value of frames 7 and 20."""
    with open_video(path, decoder) as video:
        return [int(value) for value in video.read([7, 20])[:, 0, 0, 0]]
