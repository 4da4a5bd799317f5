"""Tests that a run of the GPU tests collects no other tests, because GPU time is scarce."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# Program that collects with `-m gpu` while packages that a GPU machine may lack cannot be imported.
COLLECT = """
import sys, pytest

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("hypothesis", "fvcore", "av", "decord"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent)
options = ["-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-m", "gpu"]
sys.exit(pytest.main(options))
"""


def test_the_marker_is_used_in_its_folder_only() -> None:
    marked = [file for file in TESTS.rglob("*.py") if "mark." + "gpu" in file.read_text()]
    assert [file for file in marked if TESTS / "gpu" not in file.parents] == []


def test_the_marker_alone_collects_its_folder_and_nothing_else() -> None:
    command = [sys.executable, "-c", COLLECT]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    modules = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert modules == {f"tests/gpu/{file.name}" for file in (TESTS / "gpu").glob("test_*.py")}, done.stdout
    assert "deselected" not in done.stdout
