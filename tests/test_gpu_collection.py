"""GPU time is scarce: a run of the GPU tests must not collect the others first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent


def test_the_marker_is_used_in_its_folder_only() -> None:
    marked = [file for file in TESTS.rglob("*.py") if "mark." + "gpu" in file.read_text()]
    assert [file for file in marked if TESTS / "gpu" not in file.parents] == []


def test_the_marker_alone_collects_its_folder_and_nothing_else() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-m", "gpu"]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if "::" in line]
    modules = {line.partition("::")[0] for line in found}
    assert modules == {f"tests/gpu/{file.name}" for file in (TESTS / "gpu").glob("test_*.py")}, done.stdout
    assert "deselected" not in done.stdout
