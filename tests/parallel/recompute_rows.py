"""Rows measured by tools/bench_recompute.py, for tests on a CPU and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def benchmark(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Run tools/bench_recompute.py once, on the GPU if there is one, and return its rows."""
    command = [sys.executable, str(ROOT / "tools/bench_recompute.py"), *arguments, "data.train=null"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [*command, "--rounds", "1", "--json", str(folder / "rows.json")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "rows.json").read_text())["rows"]
