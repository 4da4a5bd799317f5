"""Tests that the checks before a commit are those of `make lint`, in the versions of constraints.txt."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]


def pins() -> dict[str, set[str]]:
    """Read the pinned versions of each package; a package can have one for each range of Python versions."""
    versions: dict[str, set[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            versions.setdefault(canonicalize_name(pin.name), set()).add(str(pin.specifier))
    return versions


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: str(hook["id"]))
def test_hooks_use_the_pinned_versions(hook: dict[str, list[str]]) -> None:
    (needed,) = map(Requirement, hook["additional_dependencies"])
    assert pins()[canonicalize_name(needed.name)] == {str(needed.specifier)}


def test_make_lint_runs_the_tools_of_the_hooks() -> None:
    lint = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    programs = {hook["entry"].split()[0] for hook in HOOKS} - {"check-added-large-files"}
    assert programs == {"ruff", "codespell"}
    assert all(f"$(BIN)/{program}" in lint for program in programs)
