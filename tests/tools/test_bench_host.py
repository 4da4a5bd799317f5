"""Tests of the host benchmark: the whole command on its smallest cases."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools/bench_host.py"


def test_the_engine_launches_more_than_the_plain_loop(tmp_path: Path) -> None:
    file = tmp_path / "host.json"
    command = [
        sys.executable,
        str(TOOL),
        "b_pretrain",
        "b_pretrain_plain",
        "--steps",
        "2",
        "--json",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = {(row["case"], row["phase"]): row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 8 and "b_pretrain_plain" in done.stdout
    for case in ("b_pretrain", "b_pretrain_plain"):
        phases = [rows[case, phase] for phase in ("forward", "backward", "update")]
        whole = rows[case, "step"]
        assert sum(row["operators"] for row in phases) == whole["operators"]
        assert all(0 < row["ms_fastest"] <= row["ms_median"] for row in phases)
    assert rows["b_pretrain", "update"]["operators"] > rows["b_pretrain_plain", "update"]["operators"] > 0
    assert rows["b_pretrain_plain", "step"]["waits"] == 0


def test_an_unknown_case_is_told_in_one_line() -> None:
    done = subprocess.run([sys.executable, str(TOOL), "b_pretran"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown case") and "b_pretrain" in done.stderr
