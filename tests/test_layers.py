"""Tests of the import rules between the rooms of the package, and of the documents that describe them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "everest_ds"

# Room (a folder of the package) -> rooms that it imports, besides itself and the modules of BASE. A room may
# import only rooms that are listed before it.
ROOMS: dict[str, set[str]] = {
    "config": set(),
    "launch": set(),
    "reports": set(),
    "checkpoints": set(),
    "costs": {"config"},
    "models": {"config"},
    "data": {"config"},
    "interchange": {"config", "checkpoints", "models", "data"},
    "parallel": {"config", "launch", "checkpoints", "models"},
    "profiling": {"config", "costs", "models", "data"},
    "inference": {"config", "reports", "checkpoints", "models", "data", "interchange"},
    "probing": {"config", "reports", "checkpoints", "models", "data", "inference"},
    "training": {
        *{"config", "launch", "reports", "checkpoints", "costs", "models", "data", "interchange"},
        *{"parallel", "profiling", "probing"},
    },
    "jobs": {"config", "launch", "checkpoints", "costs", "parallel", "training"},
    "efficiency": {"config", "reports", "costs", "models", "parallel", "profiling", "training"},
    "tuning": {
        *{"config", "launch", "reports", "costs", "data", "parallel", "profiling", "training", "jobs"},
    },
    "cli": {
        *{"config", "launch", "checkpoints", "data", "interchange", "parallel", "inference", "probing"},
        *{"training", "jobs", "efficiency", "tuning"},
    },
}
# Modules beside the rooms. They import no room, except for the two doors to the package.
DOORS = {"__init__": {"inference", "interchange"}, "__main__": {"cli"}}
BASE = {
    "cache",
    "console",
    "durable_files",
    "errors",
    "host_memory",
    "log",
    "output_paths",
    "shipped",
    "stop_signals",
    "units",
}
# Library -> the only folders that import it, with the folders in them.
OWNERS: dict[str, set[str]] = {
    "torch": {
        *{"checkpoints", "models", "data", "interchange", "parallel", "profiling", "inference", "probing"},
        *{"training", "efficiency"},
    },
    "torch.distributed": {"parallel"},
    "deepspeed": {"parallel"},
    "fairscale": {"parallel"},
    "safetensors": {"checkpoints"},
    "decord": {"data/decoding"},
    "torchcodec": {"data/decoding"},
    "av": {"data"},
    "simplejpeg": {"data/store"},
    "mpi4py": {"launch"},
    "typer": {"cli"},
    "jinja2": {"reports"},
}
# Modules of these rooms, and of BASE, load without torch, which takes seconds. Some functions import it.
WITHOUT_TORCH = ("config", "launch", "reports", "costs", "jobs")

MODULES = {file.relative_to(PACKAGE).with_suffix("").as_posix(): file for file in PACKAGE.rglob("*.py")}


def room(module: str) -> str:
    return module.partition("/")[0]


def import_statements(tree: ast.AST, at_load: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports of a module, or only those that run when the module is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif at_load and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not (at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from import_statements(node, at_load)


@cache
def imported_names(module: str, at_load: bool = False) -> list[str]:
    found = []
    for node in import_statements(ast.parse(MODULES[module].read_text()), at_load):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        else:
            assert node.level == 0, f"{module}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


@cache
def imported_modules(module: str, at_load: bool = False) -> set[str]:
    """Return the modules of this package that a module imports."""
    found = set()
    for name in imported_names(module, at_load):
        top, *parts = name.split(".")
        if top == PACKAGE.name:
            candidates = ("/".join(parts), "/".join([*parts, "__init__"]), "/".join(parts[:-1]))
            package = "/".join([*parts[:-1], "__init__"])
            found.add(next(place for place in (*candidates, package) if place in MODULES))
    return found - {module}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_follow_the_table(module: str) -> None:
    here = room(module)
    allowed = BASE | DOORS.get(here, set()) | ({here} | ROOMS[here] if here in ROOMS else set())
    for there in map(room, imported_modules(module)):
        assert there in allowed or there == "__init__", f"{module} imports {there}"
    for name in imported_names(module):
        for library, owners in OWNERS.items():
            if f"{name}.".startswith(f"{library}."):
                assert any(f"{module}/".startswith(f"{owner}/") for owner in owners), f"{module}: {name}"


def test_the_table_holds_the_rooms_and_their_imports_and_no_more() -> None:
    in_rooms = {module for module in MODULES if "/" in module}
    assert {room(module) for module in in_rooms} == set(ROOMS)
    assert set(MODULES) - in_rooms == BASE | set(DOORS)
    for here, allowed in ROOMS.items():
        used = {
            room(there) for module in in_rooms if room(module) == here for there in imported_modules(module)
        }
        assert allowed <= used, f"{here} no longer imports {allowed - used}"


def test_no_room_imports_a_later_one() -> None:
    order = list(ROOMS)
    for here, allowed in ROOMS.items():
        assert all(order.index(there) < order.index(here) for there in allowed), here


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph = {module: imported_modules(module, at_load=True) for module in MODULES if module != "__init__"}
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


@pytest.mark.parametrize("here", [*WITHOUT_TORCH, *sorted(BASE)])
def test_modules_that_promise_it_load_without_torch(here: str) -> None:
    pending = {module for module in MODULES if room(module) == here}
    loaded: set[str] = set()
    while pending:
        module = pending.pop()
        loaded.add(module)
        pending |= imported_modules(module, at_load=True) - loaded
        for name in imported_names(module, at_load=True):
            assert name.partition(".")[0] != "torch", f"{module} imports torch when {here} loads"


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without `__init__.py` works in a checkout but is missing from the wheel."""
    assert all((file.parent / "__init__.py").is_file() for file in MODULES.values())


def test_contributing_lists_the_rooms() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tour = text.partition("```\neverest_ds/\n")[2].partition("\n```")[0].partition("\nds_configs/")[0]
    lines = [line for line in tour.splitlines() if re.match(r"  \S", line)]
    assert set(re.findall(r"(\w+)\.py", lines[0])) == BASE
    assert [line.split("/")[0].strip() for line in lines[1:]] == [*ROOMS, "recipes"]


def test_the_architecture_guide_shows_the_table() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \| ([^|]*) \|", text, re.MULTILINE)
    shown = {here: set(re.findall(r"\w+", allowed)) - {"nothing"} for here, allowed in rows}
    assert shown == ROOMS and [here for here, _ in rows] == list(ROOMS)


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_the_guides_name_exist(document: str) -> None:
    named = re.findall(r"`([\w/{},]+\.py)`", (ROOT / document).read_text())
    assert named
    for file in named:
        assert (PACKAGE / file).is_file() or (ROOT / file).is_file(), file
