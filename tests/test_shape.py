"""Tests of the size of the package's functions, files and folders, and of its names and docstrings.

The bounds are a ratchet: tighten a bound when the code allows it; restructure the code instead of raising it.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median, quantiles

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "everest_ds"
TREES = {file: ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}
MODULES = [file for file in TREES if file.stem != "__init__"]
LIBRARY = [
    file for file in MODULES if file.parent.name != "cli"
]  # names in cli/ are those of commands and options

Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def num_lines(function: Function) -> int:
    """Return the number of lines from `def` to the last statement."""
    assert function.end_lineno is not None
    return function.end_lineno - function.lineno + 1


def test_functions_are_short() -> None:
    lines = [num_lines(function) for tree in TREES.values() for function in functions(tree)]
    assert median(lines) <= 8
    assert quantiles(lines, n=10)[-1] <= 20
    long = {
        f"{file.relative_to(PACKAGE)}:{function.name}": num_lines(function)
        for file, tree in TREES.items()
        for function in functions(tree)
        if num_lines(function) > 60
    }
    assert not long


def test_files_and_folders_are_small() -> None:
    assert not [file for file in TREES if len(file.read_text().splitlines()) > 400]
    sizes = Counter(file.parent.relative_to(PACKAGE).as_posix() for file in MODULES)
    assert not {folder: size for folder, size in sizes.items() if size > 20}


def one_caller_helpers(tree: ast.AST) -> Iterator[str]:
    """Yield the private functions of up to 8 lines that a module mentions only once, in their caller."""
    mentions = Counter(
        node.id if isinstance(node, ast.Name) else node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Name | ast.Attribute)
    )
    for function in functions(tree):
        name = function.name
        if (
            name.startswith("_")
            and not name.startswith("__")
            and mentions[name] == 1
            and num_lines(function) <= 8
        ):
            yield name


def test_few_helpers_have_one_caller() -> None:
    """A reader follows a call for an idea, not for a line or two."""
    num_functions = sum(1 for tree in TREES.values() for _ in functions(tree))
    num_helpers = sum(1 for tree in TREES.values() for _ in one_caller_helpers(tree))
    assert num_helpers < 0.08 * num_functions, f"{num_helpers} of {num_functions} functions"


@pytest.mark.parametrize("folder", ["everest_ds", "tools", "tests"])
def test_docstrings_open_with_a_whole_phrase(folder: str) -> None:
    """A docstring that opens with a relative clause cannot be understood without its code."""
    fragment = re.compile(r"(What|Of|Which|Those|So)\b")
    found = [
        f"{file.relative_to(ROOT)}: {docstring.splitlines()[0]}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, Function | ast.ClassDef | ast.Module)
        if fragment.match(docstring := ast.get_docstring(node) or "")
    ]
    assert not found


def repeated(places: Iterable[tuple[str, Path]]) -> dict[str, list[str]]:
    """Return the names that belong to several files."""
    files: dict[str, set[str]] = {}
    for name, file in places:
        files.setdefault(name, set()).add(file.relative_to(PACKAGE).as_posix())
    return {name: sorted(several) for name, several in files.items() if len(several) > 1}


def test_no_two_modules_have_one_name() -> None:
    assert not repeated((file.stem, file) for file in LIBRARY)


def public_names(tree: ast.Module) -> Iterator[str]:
    """Yield the classes, functions and type aliases that a module defines for others."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign) and "TypeVar" not in ast.unparse(node.value):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
            names = [name for name in names if re.match(r"[A-Z]\w*[a-z]", name)]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def test_no_two_public_types_or_functions_have_one_name() -> None:
    assert not repeated((name, file) for file in LIBRARY for name in public_names(TREES[file]))
