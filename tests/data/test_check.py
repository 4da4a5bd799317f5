"""The check finds every bad video, in order, and outlives one that kills its process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from everest_ds.data.check import check_manifest, map_isolated
from everest_ds.data.manifest import Sample


def test_problems_come_in_the_order_of_the_manifest_with_reasons(
    tmp_path: Path, synthetic_video: Path
) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video" * 50)
    paths = [tmp_path / "text.mp4", synthetic_video, tmp_path / "absent.mp4", tmp_path / "empty.mp4"]
    progress: list[int] = []
    problems = check_manifest(
        [Sample(path, None) for path in paths], min_frames=16, workers=2, on_progress=progress.append
    )
    assert [problem.path.name for problem in problems] == ["text.mp4", "absent.mp4", "empty.mp4"]
    assert "Invalid data" in problems[0].reason
    assert problems[1].reason == "no such video file"
    assert progress == [1, 2, 3, 4]


@pytest.mark.parametrize(("min_frames", "reasons"), [(24, []), (25, ["24 frames; allowed: 25 or more"])])
def test_a_video_may_have_just_enough_frames(
    synthetic_video: Path, min_frames: int, reasons: list[str]
) -> None:
    samples = [Sample(synthetic_video, 0)]
    problems = check_manifest(samples, min_frames=min_frames, workers=1, on_progress=lambda done: None)
    assert [problem.reason.partition("given: ")[2] for problem in problems] == reasons


def square_or_die(number: int) -> int:
    """End the process as a crash in a decoder does, for odd numbers."""
    if number % 2:
        os.abort()
    return number * number


def test_items_that_kill_their_process_are_told_from_those_beside_them() -> None:
    results = map_isolated(square_or_die, range(6), crashed=-1, workers=2)
    assert list(results) == [0, -1, 4, -1, 16, -1]


def test_processes_that_cannot_start_are_not_blamed_on_the_items() -> None:
    script = (
        "from everest_ds.data.check import map_isolated as m; print(list(m(abs, [-1], crashed=0, workers=1)))"
    )
    # A program read from a pipe cannot be imported again by its worker processes.
    done = subprocess.run([sys.executable], input=script, capture_output=True, text=True)
    assert done.returncode == 1 and "BrokenProcessPool" in done.stderr
