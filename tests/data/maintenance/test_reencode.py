"""Tests of re-encoding: a new file has the source's frames under the same numbers, or does not exist."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from everest_ds.cli.app import main
from everest_ds.data.decoding.open_video import open_video
from everest_ds.data.maintenance.gain import Gain
from everest_ds.data.maintenance.reencode import plan_jobs
from everest_ds.data.video_list import Sample, read_manifest
from everest_ds.errors import DataError, UsageError
from tests.data.conftest import lay_down, noisy_pictures, write_video


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr("sys.argv", ["everest-ds", "data", "reencode", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_frames_keep_their_numbers_and_files_their_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    write_video(source / "deep" / "a.avi", noisy_pictures(20, 75, 100), "mpeg4")
    lay_down(write_video(source / "b.mp4", noisy_pictures(12), g="12"))
    (source / "c.mp4").write_text("not a video")
    (source / "list.txt").write_text("deep/a.avi 3\nb.mp4 1\nb.mp4#4-10 2\nc.mp4 0\n")
    options = ["--short-side", 48, "--gop", 4, "--workers", 1, "--stride", 1, "--frames", 5, "--json"]
    words = [source / "list.txt", "--out", out, *options, tmp_path / "facts.json"]
    assert command(monkeypatch, *words) == 3
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["failed"] == 1 and facts["decode_after_ms"] > 0 and "c.mp4" in facts["problems"][0][0]
    samples = read_manifest(out / "list.txt", root=None, num_classes=None, labelled=True)
    assert samples == [
        Sample(out / "deep" / "a.mp4", 3),
        Sample(out / "b.mp4", 1),
        Sample(out / "b_4-10.mp4", 2),
    ]
    for sample, first, count in zip(samples, (0, 0, 4), (20, 12, 6), strict=True):
        origin = source / ("deep/a.avi" if first == 0 and count == 20 else "b.mp4")
        with open_video(sample.path) as new, open_video(origin, short_side=48) as old:
            assert new.num_frames == count
            frames, expected = new.read(range(count)), old.read(range(first, first + count))
            assert min(frames.shape[1:3]) == 48
            expected = expected[:, : frames.shape[1], : frames.shape[2]].float()
            nearest = [int((expected - frame).abs().mean((1, 2, 3)).argmin()) for frame in frames]
            assert nearest == list(range(count))
        with av.open(str(sample.path)) as container:
            keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
        assert all(keys[::4]) and np.mean(keys) < 0.5
    assert not list(out.rglob("*.tmp*"))
    assert command(monkeypatch, *words) == 3
    assert json.loads((tmp_path / "facts.json").read_text())["there_already"] == 3


def test_two_videos_never_become_one_file_nor_a_video_itself(tmp_path: Path) -> None:
    pair = [Sample(tmp_path / "a.avi", 0), Sample(tmp_path / "a.webm", 0)]
    with pytest.raises(DataError, match="two videos would be written"):
        plan_jobs(pair, tmp_path, tmp_path / "out")
    with pytest.raises(UsageError, match="would be overwritten"):
        plan_jobs([Sample(tmp_path / "a.mp4", 0)], tmp_path, tmp_path)


@pytest.mark.parametrize("way", ["dots", "linked output", "linked source", "linked manifest folder"])
def test_no_path_leads_out_of_the_output_folder_or_to_a_source(way: str, tmp_path: Path) -> None:
    lists, videos, out = tmp_path / "lists", tmp_path / "videos", tmp_path / "deep" / "out"
    for folder in (lists, videos, out):
        folder.mkdir(parents=True)
    source = videos / "a.mp4"
    source.touch()
    listed = lists / ".." / "videos" / "a.mp4"
    if way == "linked output":
        (out / "videos").symlink_to(videos)
        with pytest.raises(UsageError, match="outside"):
            plan_jobs([Sample(source, 0)], tmp_path, out)
        return
    if way == "linked source":
        listed = lists / "link.mp4"
        listed.symlink_to(source)
        (out / "link.mp4").symlink_to(source)
        with pytest.raises(UsageError, match="outside"):
            plan_jobs([Sample(listed, 0)], lists, out)
        (out / "link.mp4").unlink()
    if way == "linked manifest folder":
        (tmp_path / "elsewhere").symlink_to(lists)
        listed = tmp_path / "elsewhere" / ".." / "videos" / "a.mp4"
    (task,) = plan_jobs([Sample(listed, 0)], lists, out)
    assert task.target.resolve().is_relative_to(out.resolve())
    assert ".." not in task.target.parts and task.target.resolve() != source


@pytest.mark.parametrize(
    ("after_ms", "after_bytes", "verdict"),
    [
        (5.0, 50, "faster and smaller"),
        (5.0, 222, "faster"),
        (11.0, 50, "smaller"),
        (11.0, 222, "no: keep the original videos, or lower --short-side"),
    ],
)
def test_a_measurement_says_whether_the_new_files_pay_off(
    after_ms: float, after_bytes: int, verdict: str
) -> None:
    assert Gain(7, 10.0, after_ms, 100, after_bytes).facts("16 frames")["worth_it"] == verdict
