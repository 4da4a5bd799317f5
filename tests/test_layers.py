"""Tests of the import rules between the packages of the architecture, checked in the source text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "everest_ds"

GROUND = {"cache", "console", "errors", "host_memory", "log", "units", "shipped", "__init__"}
# Package -> packages that it may import, besides itself and the modules of GROUND.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "launch": set(),
    "reports": set(),
    "checkpoints": set(),
    "costs": {"config"},
    "models": {"config"},
    "data": {"config"},
    "interchange": {"config", "models", "data", "checkpoints"},
    "parallel": {"config", "launch", "models", "checkpoints"},
    "profiling": {"config", "costs", "models"},
    "inference": {"config", "models", "data", "checkpoints", "interchange", "reports"},
    "training": {
        *{"config", "launch", "reports", "checkpoints", "costs", "models", "data"},
        *{"interchange", "parallel", "profiling"},
    },
    "jobs": {"config", "launch", "checkpoints", "costs", "data", "parallel", "training"},
    "efficiency": {"config", "reports", "costs", "models", "profiling", "parallel", "training"},
    "tuning": {
        *{"config", "launch", "reports", "costs", "data", "parallel", "profiling", "training"},
        *{"jobs", "efficiency"},
    },
    "cli": {
        *{"config", "launch", "reports", "checkpoints", "costs", "data", "interchange", "parallel"},
        *{"profiling", "inference", "training", "jobs", "efficiency", "tuning"},
    },
    "__main__": {"cli"},
}
# Library -> the only packages that may import it.
OWNERS: dict[str, set[str]] = {
    "torch": {
        *{"models", "data", "checkpoints", "interchange", "inference"},
        *{"parallel", "training", "profiling", "efficiency", "tuning"},
    },
    "deepspeed": {"parallel"},
    "fairscale": {"parallel"},
    "mpi4py": {"launch"},
    "decord": {"data"},
    "av": {"data"},
    "typer": {"cli"},
    "jinja2": {"reports"},
}


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(file: Path) -> str:
    relative = file.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(file: Path) -> None:
    here = room(file)
    allowed = GROUND if here in GROUND else ALLOWED[here] | GROUND | {here}
    for name in imports(file):
        top, _, rest = name.partition(".")
        if top == "everest_ds":
            there = rest.split(".")[0]
            assert there in allowed or there.startswith("__"), f"{here} imports {there}"
        elif top in OWNERS:
            assert here in OWNERS[top], f"{here} imports {top}"


def test_torch_distributed_stays_in_parallel() -> None:
    for file in SOURCES:
        if room(file) != "parallel":
            assert not any(name.startswith("torch.distributed") for name in imports(file)), file


def test_every_folder_of_sources_is_a_package() -> None:
    """Every folder of sources has an `__init__.py`; a folder without one would be missing from the wheel."""
    assert all((folder / "__init__.py").is_file() for folder in {file.parent for file in SOURCES})
