"""Tests of crafted checkpoints: the real sizes of the files bound what is read and allocated."""

from __future__ import annotations

import copy
import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from everest_ds.checkpoints.export import export_weights, load_weights, open_weights
from everest_ds.checkpoints.folder import verify_checkpoint
from everest_ds.checkpoints.sealed_manifest import STATES
from everest_ds.errors import CheckpointError, ExitCode
from everest_ds.parallel.checkpointing import newest_complete
from everest_ds.parallel.world import World
from tests.checkpoints.made import SHAPES, forge_manifest, make_checkpoint, states_of
from tests.ranks import run_ranks

_SPARE_BYTES = 256 * 2**20
_PAGE_BYTES = resource.getpagesize()
_ODD: list[Any] = [True, 1.0, 1e15, 1e30, -1, 0, 10**9, 10**15, 2**63, 10**30, "3", None, [], {}]


@contextmanager
def little_memory() -> Iterator[None]:
    """Let this process allocate no more than a little beside what it has."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (used + _SPARE_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def numbers_of(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every number, list and dictionary below `tree`."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from numbers_of(value, (*path, key))


def put(tree: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    tree[path[-1]] = value


# Whole parameters that agree with themselves, but not with the files.
CRAFTED: dict[str, dict[str, Any]] = {
    "no elements in a billion shards": {"shape": [0], "degree": 10**9, "pieces": []},
    "no elements": {"shape": [3, 0], "pieces": []},
    "petabytes": {"shape": [10**15], "pieces": [["a.safetensors", 0, 0, 10**15]]},
    "beyond the integers": {"shape": [10**30], "pieces": [["a.safetensors", 0, 0, 10**30]]},
    "a product beyond the integers": {
        "shape": [2**62, 2**62],
        "pieces": [["a.safetensors", 0, 0, 2**62], ["a.safetensors", 0, 2**62, 2**124 - 2**62]],
    },
    "a float": {"shape": [1e30], "pieces": [["a.safetensors", 0, 0, 1e30]]},
    "a boolean": {"shape": [True], "pieces": [["a.safetensors", 0, 0, True]]},
    "negative": {"shape": [-1, -1], "pieces": [["a.safetensors", 0, 0, 1]]},
    "no pieces": {"shape": [4], "pieces": []},
    "empty pieces": {"shape": [1], "pieces": [["a.safetensors", 0, 0, 0]] * 9 + [["a.safetensors", 0, 0, 1]]},
    "many axes": {"shape": [1] * 10_000, "pieces": [["a.safetensors", 0, 0, 1]]},
    "more rows than elements": {"shape": [4], "outer": 8, "pieces": [["a.safetensors", 0, 0, 4]]},
}


def refuse(world: World, folder: Path) -> int:
    """Return the exit code with which a run refuses to resume from the checkpoints in `folder`."""
    with pytest.raises(CheckpointError, match="not a manifest of this version") as error:
        newest_complete(folder, world)
    return error.value.exit_code


@pytest.mark.parametrize("crafted", CRAFTED.values(), ids=list(CRAFTED))
def test_a_crafted_parameter_is_refused_before_anything_is_allocated(
    tmp_path: Path, crafted: dict[str, Any]
) -> None:
    path = make_checkpoint(tmp_path / "checkpoints", 3)
    forge_manifest(path, lambda tree: tree["parameters"].update(scale=crafted))
    with little_memory():
        for read in (
            lambda: verify_checkpoint(path),
            lambda: export_weights(tmp_path, tmp_path / "w.safetensors", "fp32"),
            lambda: load_weights(tmp_path),
            lambda: open_weights(path).__enter__(),
        ):
            with pytest.raises(CheckpointError, match=r"parameters.*fix: use another checkpoint") as error:
                read()
            assert error.value.exit_code == ExitCode.CHECKPOINT
    assert not (tmp_path / "w.safetensors").exists()


def test_a_run_does_not_resume_from_a_crafted_manifest(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)
    crafted = CRAFTED["no elements in a billion shards"]
    forge_manifest(path, lambda tree: tree["parameters"].update(scale=crafted))
    assert run_ranks(refuse, 2, tmp_path) == [ExitCode.CHECKPOINT] * 2


def test_larger_files_in_the_manifest_than_on_the_disk_are_refused(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, 3)

    def claim(tree: dict[str, Any]) -> None:
        tree["files"]["a.safetensors"][0] = 10**18
        tree["parameters"]["scale"] = {"shape": [10**16], "pieces": [["a.safetensors", 0, 0, 10**16]]}

    forge_manifest(path, claim)
    with little_memory(), pytest.raises(CheckpointError, match=r"a\.safetensors has \d+ of 10{18} bytes"):
        load_weights(path)


@settings(max_examples=60)
@given(st.data())
def test_no_change_of_a_manifest_costs_memory_or_ends_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = make_checkpoint(tmp_path_factory.mktemp("made"), 3)
    tree = json.loads((path / "manifest.json").read_text())
    places = st.sampled_from(list(numbers_of(tree)))
    changed = copy.deepcopy(tree)
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        try:
            put(changed, place, data.draw(st.sampled_from(_ODD) | st.integers()))
        except (KeyError, TypeError, IndexError):
            continue  # an earlier change removed this place
    forge_manifest(path, lambda tree: tree.update(changed))
    with little_memory():
        try:
            weights, _ = load_weights(path)
        except CheckpointError:
            return
    for name in set(weights) & set(SHAPES):
        assert torch.equal(weights[name].reshape(-1), states_of(name)[STATES[0]].reshape(-1))
