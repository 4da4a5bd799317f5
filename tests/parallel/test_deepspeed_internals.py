"""Tests of DeepSpeed's undocumented names: each exists, a missing one is named, and all uses are listed."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from everest_ds.errors import EverestError
from everest_ds.parallel import deepspeed_internals as internals
from everest_ds.parallel import lean_update
from everest_ds.parallel.world import World
from tests.parallel.equality import STAGES, experiment, start
from tests.ranks import run_ranks

PARALLEL = Path(internals.__file__).parent
# Names of DeepSpeed's documented interface, and of PyTorch's modules and optimisers.
DOCUMENTED_MODULES = {"deepspeed", "deepspeed.accelerator", "deepspeed.utils"}
# Words that other objects of these files have as attributes too.
COMMON = set("device dtype logger loss_scale mpu numel optimizer start step zero_grad".split())


def listed() -> set[str]:
    tables: list[Mapping[Any, str]] = [
        internals.MODULES,
        internals.OPTIMIZERS,
        internals.UPDATES,
        internals.PARAMETERS,
    ]
    rows = [row for table in tables for row in table.values()] + list(internals.ON_DEMAND.values())
    rows += [internals.ENGINE, internals.FRAGMENT, internals.ADDRESS, internals.SHARE]
    return set(" ".join(rows).split())


def refusal(check: Callable[[], object]) -> str:
    """Return the message of the error that `check` raises, or an empty string."""
    try:
        check()
    except EverestError as error:
        return str(error)
    return ""


def hide(part: Any, name: str) -> Callable[[], None]:
    """Remove an attribute of an object and of its classes; return a function that restores it."""
    owners = [owner for owner in type(part).__mro__ if name in vars(owner)]
    removed = [(owner, vars(owner)[name]) for owner in owners]
    for owner in owners:
        delattr(owner, name)
    if hasattr(part, name):
        removed.append((part, getattr(part, name)))
        delattr(part, name)

    def restore() -> None:
        for owner, value in removed:
            setattr(owner, name, value)

    return restore


def unnamed(check: Callable[[], None], parts: list[tuple[str, object, str]]) -> list[str]:
    """Return the names that `check` does not name in its error when they are missing."""
    silent = [refusal(check)] if refusal(check) else []
    for place, part, names in parts:
        for name in names.split():
            restore = hide(part, name)
            found = refusal(check)
            restore()
            if f"without `{name}` of {place}" not in found or "allowed: 0.19.8 or a later" not in found:
                silent.append(f"{place}: {name}: {found}")
    return silent


def names_not_missed(world: World, stage: int, offload: bool) -> list[str]:
    config = experiment("pretrain", stage, world.size, offload=offload)
    engine: Any = start(world, config)
    lean_stage = 0 if offload else stage
    if lean_stage:  # as DeepSpeed built it
        engine.optimizer.__class__ = type(engine.optimizer).__bases__[0]
    parts = list(internals._parts(engine, lean_stage))
    assert refusal(lambda: internals.check_type(engine.optimizer, type(engine.optimizer))) == ""
    return unnamed(lambda: internals.check_engine(engine, lean_stage), parts)


@pytest.mark.parametrize(("stage", "offload"), [*((stage, False) for stage in STAGES), (2, True)])
def test_a_name_that_an_engine_lacks_is_named(stage: int, offload: bool) -> None:
    assert run_ranks(names_not_missed, 1, stage, offload) == [[]]


def test_a_name_that_a_module_lacks_is_named() -> None:
    parts = []
    for place, names in internals.MODULES.items():
        module, _, kind = place.partition(":")
        found = import_module(module)
        parts.append((place, getattr(found, kind) if kind else found, names))
    assert unnamed(internals.check_modules, parts) == []


def test_names_set_during_a_step_are_in_the_source() -> None:
    for module, names in internals.ON_DEMAND.items():
        source = inspect.getsource(import_module(module))
        assert [name for name in names.split() if not re.search(rf"\b{name}\b", source)] == []


def test_another_optimiser_is_refused() -> None:
    with pytest.raises(EverestError, match=r"with a object, not a DeepSpeedZeroOptimizer; .*==0\.19\.8"):
        lean_update.make_lean(object(), sums_in_float32=False)


def imported(tree: ast.Module) -> set[tuple[str, str]]:
    return {
        (node.module or "", alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "deepspeed"
        for alias in node.names
    }


@pytest.mark.parametrize("file", sorted(PARALLEL.glob("*.py")), ids=lambda file: file.stem)
def test_no_other_module_uses_an_undocumented_name(file: Path) -> None:
    tree = ast.parse(file.read_text())
    known = {(place, name) for place, names in internals.MODULES.items() for name in names.split()}
    hidden = {(module, name) for module, name in imported(tree) if module not in DOCUMENTED_MODULES}
    if file.stem in ("deepspeed_internals", "lean_update"):
        assert hidden <= known
        return
    assert hidden == set()
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert used & (listed() - COMMON) == set()


def test_every_name_of_deepspeed_in_the_lean_update_is_listed() -> None:
    """An attribute of `self`, `super()`, an optimiser or the engine is listed, or defined in this module."""
    tree = ast.parse(inspect.getsource(lean_update))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    holders = {"self", "super", "optimizer", "engine", "param", "averaged"}
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            value = node.value.func if isinstance(node.value, ast.Call) else node.value
            if isinstance(value, ast.Name) and value.id in holders:
                used.add(node.attr)
    documented = {"module", "grad", "__class__"}
    assert used - own - documented - listed() == set()
    replaced = {name for name in own if name in vars(lean_update.DeepSpeedZeroOptimizer)}
    assert replaced <= set(internals.UPDATES[1].split())
