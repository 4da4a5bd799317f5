"""Tests of the tools that damage videos and watch memory: small versions of the runs in docs/data.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.conftest import noisy_pictures, write_video

TOOLS = Path(__file__).parents[2] / "tools"
NEVER_WHOLE = {
    *("5 % of bytes flipped", "not a video", "empty", "directory", "symlink loop"),
    *("dangling symlink", "pipe", "unreadable"),
}


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Write a short video in each of four formats and return their folder."""
    folder = tmp_path / "videos"
    folder.mkdir()
    write_video(folder / "a.mp4", noisy_pictures(40), g="12", bf="2")
    write_video(folder / "b.webm", noisy_pictures(40), "libvpx-vp9", g="12")
    write_video(folder / "c.avi", noisy_pictures(40), "mpeg4", g="12")
    write_video(folder / "d.mkv", noisy_pictures(40), g="12", bf="2")
    return folder


def tool(name: str, *words: object) -> Any:
    """Run a tool and return the JSON that it writes to its last argument."""
    out = Path(str(words[-1]))
    subprocess.run(
        [sys.executable, TOOLS / name, *map(str, words)], check=True, capture_output=True, text=True
    )
    return json.loads(out.read_text())


@pytest.mark.slow
def test_every_damaged_video_is_accounted_for_and_none_crashes_or_hangs(videos: Path, tmp_path: Path) -> None:
    found = tool("mutate_videos.py", videos, "--count", 56, "--workers", 2, "--json", tmp_path / "out.json")
    facts, kinds = found["facts"], {row["kind"]: row for row in found["kinds"]}
    assert facts["accounted"] == facts["known to a second check"] == facts["mutants"] == 56
    assert all(row["broken"] + row["whole"] == row["files"] == 4 for row in kinds.values())
    assert all(row["crash or hang"] == 0 for row in kinds.values())
    assert {kind for kind in NEVER_WHOLE if kinds[kind]["whole"]} == set()
    assert kinds["wrong extension"]["of these unharmed"] == 4
    assert kinds["truncated"]["broken"] >= 3


@pytest.mark.slow
def test_memory_does_not_grow_with_the_videos_opened(videos: Path, tmp_path: Path) -> None:
    found = tool(
        "bench_decoder_memory.py",
        *(videos, "--opens", 150, "--plot", tmp_path / "curve.png", "--json", tmp_path / "out.json"),
    )
    for row in found["summary"]:
        assert abs(row["last_tenth_against_first_pct"]) < 5, row
    assert (tmp_path / "curve.png").is_file()
