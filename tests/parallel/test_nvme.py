"""Tests of optimiser states on a disk: equal training, portable checkpoints and helpful errors."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.checkpoints.sealed_manifest import STATES
from everest_ds.config import Experiment
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.errors import ConfigError
from everest_ds.parallel.checkpointing import Keep, Saving, load_checkpoint, newest_complete
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.parallel.mesh import Mesh, form_mesh
from everest_ds.parallel.nvme import _refuse_stale_locks, check_nvme
from everest_ds.parallel.world import World
from everest_ds.parallel.zero_states import states_of_engine
from everest_ds.shipped import shipped
from tests.checkpoints.made import facts
from tests.parallel.equality import engine_runs, experiment, plain_run, start
from tests.parallel.test_equality import assert_equal, splittable_decoder  # noqa: F401
from tests.ranks import run_ranks

reference = lru_cache(plain_run)


def on_disk(folder: Path) -> Experiment:
    return experiment("pretrain", 3, data_degree=2, nvme=folder)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a writable folder.*local disk of every node"):
        check_nvme(on_disk(tmp_path / "absent"))


def test_a_machine_without_a_compiler_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(
        ConfigError, match="async_io cannot be built on this machine.*apt-get install libaio-dev"
    ):
        check_nvme(on_disk(tmp_path))


def test_the_lock_of_a_killed_compile_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old lock, for which PyTorch would wait forever, is refused; a fresh lock is accepted."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", os.fspath(tmp_path))
    (tmp_path / "async_io").mkdir()
    lock = tmp_path / "async_io" / "lock"
    lock.touch()
    _refuse_stale_locks()
    for file in (lock, lock.parent):
        os.utime(file, (0, 0))
    with pytest.raises(ConfigError, match=f"{lock}: lock of a compilation.*remove this file"):
        _refuse_stale_locks()


def test_nvme_in_a_file_of_ones_own_is_refused(tmp_path: Path) -> None:
    tree = json.loads((shipped("ds_configs") / "zero3_nvme.json").read_text())
    (tmp_path / "own.json").write_text(json.dumps(tree))
    config = experiment("pretrain", 3, data_degree=2, ds_config=tmp_path / "own.json")
    with pytest.raises(ConfigError, match="only the run config may set.*set parallelism.offload_to_nvme"):
        resolve_ds_config(config, 2)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    if not (Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "async_io" / "async_io.so").is_file():
        pytest.skip(
            "async_io is not compiled; `make test-nvme` compiles it, which takes minutes, and runs this test"
        )
    try:
        check_nvme(on_disk(tmp_path))
    except ConfigError as error:
        pytest.skip(str(error))
    return tmp_path


def states_of(engine: Any, mesh: Mesh) -> list[list[float]]:
    view = states_of_engine(engine, mesh)
    held = list(view.shards())
    return [view.get(each, state).tolist() for state in STATES for each in held]


def fill_states(engine: Any, mesh: Mesh) -> None:
    """Fill the states with random numbers that depend on the rank."""
    view = states_of_engine(engine, mesh)
    view.slots()
    generator = torch.Generator().manual_seed(mesh.world.rank)
    for each in list(view.shards()):
        for state in STATES:
            view.put(each, state, torch.rand(each.numel, generator=generator))
    view.refresh()


def move(world: World, here: Experiment, there: Experiment, folder: Path) -> bool:
    """Save with config `here` and load with `there`; return True if all states are equal."""
    mesh, engine = form_mesh(world, MeshShape.over(world.size)), start(world, here)
    fill_states(engine, mesh)
    known = facts(0).model_dump(exclude={"optimizer_step", "loss_scale"})
    Saving(engine, folder, known, Keep(1, None), mesh, copies=None).finish()
    before = states_of(engine, mesh)
    engine.destroy()
    engine = start(world, there)
    found = newest_complete(folder, world)
    assert found is not None
    load_checkpoint(engine, *found, mesh)
    after = states_of(engine, mesh)
    engine.destroy()
    return before == after


@pytest.mark.slow
def test_states_on_a_disk_train_as_the_plain_loop(disk: Path) -> None:
    assert_equal(run_ranks(engine_runs, 2, [on_disk(disk)])[0][0], reference("pretrain"), "nvme")


@pytest.mark.slow
def test_states_move_to_a_disk_and_back(disk: Path) -> None:
    elsewhere = experiment("pretrain", 3, data_degree=2)
    for number, (here, there) in enumerate(((on_disk(disk), elsewhere), (elsewhere, on_disk(disk)))):
        assert run_ranks(move, 2, here, there, disk / str(number)) == [True, True]
