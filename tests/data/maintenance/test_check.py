"""Tests of the manifest check: it finds every faulty video, in order, and records results in the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from everest_ds.config import DataConfig
from everest_ds.data.ledger import Ledger
from everest_ds.data.maintenance.check import Checked, check_manifest
from everest_ds.data.video_list import Sample
from tests.data.conftest import noisy_pictures, write_video


def run_check(samples: Sequence[Sample], ledger: Ledger, **options: object) -> Checked:
    defaults = {"min_frames": 16, "workers": 2, "on_progress": lambda done: None}
    return check_manifest(samples, ledger, DataConfig(), **(defaults | options))  # type: ignore[arg-type]


def test_problems_come_in_the_order_of_the_manifest_with_reasons(
    tmp_path: Path, synthetic_video: Path
) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video" * 50)
    (tmp_path / "circle.mp4").symlink_to(tmp_path / "circle.mp4")
    (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "gone")
    (tmp_path / "folder.mp4").mkdir()
    names = ["text", "gray", "absent", "empty", "circle", "nowhere", "folder", "n" * 300]
    samples = [Sample(tmp_path / f"{name}.mp4", None) for name in names]
    samples += [Sample(synthetic_video, None, (8, 24)), Sample(synthetic_video, None, (8, 25))]
    progress: list[int] = []
    ledger = Ledger.read(tmp_path / "ledger")
    checked = run_check(samples, ledger, on_progress=progress.append)
    assert [(p.sample.path.stem[:7], p.reason.split("; fix")[0]) for p in checked.problems[1:]] == [
        ("absent", "no such video file"),
        ("empty", "the video file is empty; given: 0 bytes"),
        ("circle", "cannot be read; given: Too many levels of symbolic links"),
        ("nowhere", "no such video file, the symbolic link is broken"),
        ("folder", "not a file; given: a folder"),
        ("nnnnnnn", "cannot be read; given: File name too long"),
        (
            "gray",
            "the video is shorter than the span of frames that the manifest names;"
            " given: frames 8 to 24; allowed: 0..23",
        ),
    ]
    assert "Invalid data" in checked.problems[0].reason
    assert progress == list(range(11))
    assert ledger.known(samples[1]).num_frames == 24  # type: ignore[union-attr]
    assert run_check(samples, ledger).num_known == len(samples)


def test_a_matroska_file_cut_off_is_found_by_the_length_in_its_header(tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.webm", noisy_pictures(200), "libvpx-vp9", g="20")
    live = write_video(tmp_path / "live.mkv", noisy_pictures(60), header={"live": "1"})
    (tmp_path / "cut.webm").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    samples = [Sample(tmp_path / name, None) for name in ("whole.webm", "cut.webm", live.name)]
    (problem,) = run_check(samples, Ledger.read(tmp_path / "ledger")).problems
    assert problem.sample == samples[1] and "as its header states" in problem.reason


@pytest.mark.parametrize(("min_frames", "reasons"), [(24, []), (25, ["24 frames; allowed: 25 or more"])])
def test_a_video_may_have_just_enough_frames(
    synthetic_video: Path, tmp_path: Path, min_frames: int, reasons: list[str]
) -> None:
    samples, ledger = [Sample(synthetic_video, 0)], Ledger.read(tmp_path / "ledger")
    for expected_known in (0, 1):  # the second check takes the number of frames from the ledger
        checked = run_check(samples, ledger, min_frames=min_frames)
        assert checked.num_known == expected_known
        assert [problem.reason.partition("given: ")[2] for problem in checked.too_short] == reasons
        assert not checked.problems


def test_a_check_that_was_stopped_goes_on_where_it_was(synthetic_video: Path, tmp_path: Path) -> None:
    samples = [Sample(synthetic_video, label) for label in range(1)]
    samples += [Sample(tmp_path / f"{number}.mp4", None) for number in range(6)]

    def stop(done: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_check(samples, Ledger.read(tmp_path / "ledger"), on_progress=stop)
    ledger = Ledger.read(tmp_path / "ledger")
    checked = run_check(samples, ledger)
    assert checked.num_known == 3 and len(checked.problems) == 6


def test_damage_between_the_ends_takes_a_check_of_every_frame(synthetic_video: Path, tmp_path: Path) -> None:
    import av

    with av.open(str(synthetic_video)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    data = bytearray(synthetic_video.read_bytes())
    data[packets[8].pos : packets[9].pos] = bytes(packets[8].size)
    synthetic_video.write_bytes(data)
    samples, ledger = [Sample(synthetic_video, None)], Ledger.read(tmp_path / "ledger")
    assert not run_check(samples, ledger).problems
    (problem,) = run_check(samples, ledger, every_frame=True).problems
    assert "Invalid data" in problem.reason
    assert run_check(samples, Ledger.read(ledger.path), every_frame=True).num_known == 1


def test_what_a_run_failed_on_is_looked_at_again(synthetic_video: Path, tmp_path: Path) -> None:
    sample, ledger = Sample(synthetic_video, None), Ledger.read(tmp_path / "ledger")
    ledger.record(sample, "the storage was unavailable", source="run")
    assert ledger.broken(sample)
    assert not run_check([sample], ledger).problems and ledger.broken(sample) is None
