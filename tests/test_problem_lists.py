"""Tests of lists of files with problems: grouped by reason, with whole names in a narrow terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.console import print_problems


def test_problems_are_grouped_by_reason_and_names_stay_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.chdir(tmp_path)
    long = f"class [a]/{'very_' * 20}long name.mp4#3-90"
    problems = [
        (f"lists/{long}", "too short; fix: [b]lower[/b] --min-frames, or remove the file from the manifest"),
        ("/elsewhere/b.mp4", "no such file"),
        (f"{tmp_path}/lists/c.mp4", "no such file"),
    ]
    print_problems("3 of 9 videos are broken", problems, Path("lists"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 of 9 videos are broken"
    assert " ".join(line.strip() for line in lines[1:3]) == f"1 x {problems[0][1]}"
    assert lines[3:] == [f"  {long}", "2 x no such file", "  /elsewhere/b.mp4", "  c.mp4"]
