"""Tests of decoding: frames are exact by number in every container, and errors name the faulty file."""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from everest_ds.data.decoding import pyav
from everest_ds.data.decoding.open_video import open_video
from everest_ds.errors import DataError
from tests.data.conftest import all_frames, lay_down, noisy_pictures, write_video

REAL = (
    "Effet_force_magnetique.ogv",
    "Principe_inertie.avi",
    "balle1-vp9.avi",
    "bikes.mp4",
    "carphone_pristine.mp4",
)
# (container, codec, pictures reordered): combinations that treat timestamps and seeks differently
CONTAINERS = (
    ("mp4", "libx264", True),
    ("mkv", "libx264", True),
    ("avi", "libx264", True),
    ("ts", "libx264", True),
    ("avi", "mpeg4", False),
    ("avi", "mpeg4", True),
    ("mpg", "mpeg2video", True),
    ("mpg", "mpeg1video", False),
    ("webm", "libvpx-vp9", False),
    ("webm", "libvpx", False),
)


def test_frames_are_rgb_bytes_in_the_order_of_showing(synthetic_video: Path) -> None:
    with open_video(synthetic_video) as video:
        frames = video.read(range(24))
    assert video.num_frames == 24
    assert frames.dtype == torch.uint8 and frames.shape == (24, 64, 64, 3)
    gray = frames.float().mean(dim=(1, 2, 3))
    assert torch.allclose(gray, 10 * torch.arange(24.0), atol=2)


def test_frames_are_in_the_order_asked_for_with_repeats(synthetic_video: Path) -> None:
    with open_video(synthetic_video) as video:
        frames = video.read([20, 3, 20, 0])
    assert [round(gray / 10) for gray in frames.float().mean(dim=(1, 2, 3)).tolist()] == [20, 3, 20, 0]


def test_frames_belong_to_the_caller(synthetic_video: Path) -> None:
    with open_video(synthetic_video) as video:
        video.read([5]).zero_()
        assert video.read([5]).float().mean() == pytest.approx(50, abs=2)


@pytest.mark.parametrize("name", REAL)
def test_random_reads_of_real_clips_equal_sequential_decoding(real_videos: Path, name: str) -> None:
    expected = all_frames(real_videos / name)
    rng = random.Random(0)
    with open_video(real_videos / name) as video:
        assert video.num_frames == len(expected)
        for _ in range(3):
            indices = rng.sample(range(len(expected)), 6)
            np.testing.assert_array_equal(video.read(indices).numpy(), expected[indices])


def test_a_first_read_at_the_end_of_a_444_clip_equals_sequential_decoding(
    real_videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = real_videos / "cockatoo.mp4"  # an x264 version whose 4:4:4 files FFmpeg must treat specially
    with open_video(path, "pyav") as video:
        monkeypatch.setattr(pyav, "open_stream", None)  # nor is the video read again from its start
        frame = video.read([video.num_frames - 1])[0]
    with av.open(str(path)) as container:
        last = deque(container.decode(video=0), maxlen=1)[0]
    np.testing.assert_array_equal(frame.numpy(), last.to_ndarray(format="rgb24"))


@pytest.mark.parametrize(("suffix", "codec", "reordered"), CONTAINERS)
def test_random_reads_equal_sequential_decoding_in_every_container(
    tmp_path: Path, suffix: str, codec: str, reordered: bool
) -> None:
    options: dict[str, Any] = {"bf": "2"} if reordered else {}
    path = write_video(tmp_path / f"clip.{suffix}", noisy_pictures(40), codec, g="6", **options)
    expected = all_frames(path)
    rng = random.Random(0)
    with open_video(path) as video:
        assert video.num_frames == len(expected) == 40
        for indices in ([39], [0], *(rng.sample(range(40), 5) for _ in range(6))):
            np.testing.assert_array_equal(video.read(indices).numpy(), expected[indices])


def test_a_vp8_picture_that_is_never_shown_has_no_number(tmp_path: Path) -> None:
    shown = write_video(tmp_path / "shown.webm", noisy_pictures(12), "libvpx", g="20")
    hidden = tmp_path / "hidden.webm"
    with av.open(str(shown)) as source, av.open(str(hidden), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                data = bytearray(bytes(packet))
                data[0] &= 0xFF if number != 5 else 0xEF  # bit 4 of a VP8 frame marks it as shown
                copy = av.Packet(bytes(data))
                copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
                copy.is_keyframe, copy.stream = packet.is_keyframe, stream
                target.mux(copy)
    expected = np.delete(all_frames(shown), 5, axis=0)
    with open_video(hidden) as video:
        np.testing.assert_array_equal(video.read(range(video.num_frames)).numpy(), expected)


def test_a_picture_stored_lying_comes_upright(tmp_path: Path) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :16] = 255  # white on the left, so on top after a clockwise turn
    path = write_video(tmp_path / "lying.mp4", [picture] * 2)
    lay_down(path)
    with open_video(path) as video:
        frame = video.read([0])[0]
    assert frame.shape == (64, 32, 3)
    assert frame[:14].float().mean() > 245 and frame[18:].float().mean() < 10


@pytest.mark.parametrize("index", [-1, 24])
def test_an_index_outside_the_video_names_file_and_range(synthetic_video: Path, index: int) -> None:
    with (
        open_video(synthetic_video) as video,
        pytest.raises(DataError, match=rf"gray\.mp4.*{index}.*0\.\.23"),
    ):
        video.read([0, index])


def test_reading_no_frame_at_all_is_refused(synthetic_video: Path) -> None:
    with open_video(synthetic_video) as video, pytest.raises(DataError, match="no index"):
        video.read([])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.mp4: no such video file"):
        open_video(tmp_path / "absent.mp4")


def test_a_folder_is_not_a_video(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="a folder"):
        open_video(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "empty; given: 0 bytes"), (b"not a video " * 99, "Invalid data")]
)
def test_a_file_without_video_data_says_why(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.mp4: .*{reason}") as caught:
        open_video(path)
    assert "\n" not in str(caught.value)


def test_a_sound_file_has_no_video_stream(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match=r"sound\.wav: the file has no video stream"):
        open_video(path)


def test_a_file_cut_off_says_after_how_many_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "cut.mp4", noisy_pictures(40))
    with (
        av.open(str(path)) as whole,
        av.open(str(tmp_path / "front.mp4"), "w", options={"movflags": "faststart"}) as front,
    ):
        stream = front.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                packet.stream = stream
                front.mux(packet)
    data = (tmp_path / "front.mp4").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"cut\.mp4: cut off or damaged after [1-3]\d frames"):
        open_video(path)


def test_damage_in_the_middle_is_an_error_there_and_nowhere_else(tmp_path: Path) -> None:
    path = write_video(tmp_path / "hole.mp4", noisy_pictures(40), g="10")
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data[packets[20].pos : packets[21].pos] = bytes(packets[20].size)
    whole = all_frames(path)
    path.write_bytes(data)
    with open_video(path) as video:
        with pytest.raises(DataError, match=r"hole\.mp4"):
            video.read([25])
        np.testing.assert_array_equal(video.read([5, 35]).numpy(), whole[[5, 35]])


def test_a_title_in_another_encoding_does_no_harm(synthetic_video: Path) -> None:
    synthetic_video.write_bytes(synthetic_video.read_bytes().replace(b"Lavf", b"L\xe9vf"))
    with open_video(synthetic_video) as video:
        assert video.num_frames == 24


def test_a_relative_path_with_a_colon_is_a_file(
    synthetic_video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic_video.rename(synthetic_video.with_name("data:a.mp4"))
    monkeypatch.chdir(synthetic_video.parent)
    with open_video(Path("data:a.mp4")) as video:
        assert video.num_frames == 24


def frame_7(paths: list[Path]) -> torch.Tensor:
    """Read frame 7 of the only path, as the `collate_fn` of a loader with batches of one path."""
    with open_video(paths[0]) as video:
        return video.read([7])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_read_the_same_frames(synthetic_video: Path, start: str) -> None:
    with open_video(synthetic_video) as video:  # the parent uses the decoder before it forks
        expected = video.read([7])
        files: Any = [synthetic_video] * 3
        loader: DataLoader[Tensor] = DataLoader(
            files, 1, num_workers=2, collate_fn=frame_7, multiprocessing_context=start
        )
        assert all(torch.equal(frame, expected) for frame in loader)
