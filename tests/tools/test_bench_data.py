"""Tests of the loader benchmark: its table of remedies compares a prediction with two measured cells."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from everest_ds.data.synthetic import SyntheticSpec, synthesize

TOOL = Path(__file__).parents[2] / "tools" / "bench_data.py"


@pytest.mark.slow
def test_predicted_gains_stand_beside_measured_ones(tmp_path: Path) -> None:
    synthesize(tmp_path / "videos", {"train": 4}, SyntheticSpec(num_frames=64, size=96), workers=1)
    settings = "--decoder pyav --workers 1 --workers 2 --repeats 1 --repeats 2 --gop 8 --size 96 --rounds 1"
    settings += " --cache"
    files = [tmp_path / "videos", "--json", tmp_path / "found.json", "--slow-folder", tmp_path]
    words = [sys.executable, str(TOOL), *map(str, files), *settings.split()]
    said = subprocess.run(words, check=True, capture_output=True, text=True).stderr
    found = json.loads((tmp_path / "found.json").read_text())
    rows = {row["remedy"]: row for row in found["remedies"]}
    staged = set() if "no row for staging" in said else {"stage, workers 1", "stage, workers 2"}
    assert set(rows) == {"workers 1 -> 2", "repeats 1 -> 2", "reencode", "cache", *staged}
    assert rows["cache"]["predicted_gain"] > 1
    for name in staged:  # from one disk to the same one, which other programs use meanwhile
        assert 0.4 < rows[name]["predicted_gain"] < 2.5
    given = next(row for row in found["stages"] if (row["source"], row["repeats"]) == ("as given", 1))
    halved = given["total"] / (given["total"] - given["decode"] / 2)
    assert rows["repeats 1 -> 2"]["predicted_gain"] == pytest.approx(halved, abs=0.02)
    for row in rows.values():
        error = 100 * (row["predicted_gain"] / row["measured_gain"] - 1)
        assert row["error_%"] == pytest.approx(error, abs=2)
