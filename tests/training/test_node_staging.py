"""Tests of staging by the ranks of a run; ranks of different nodes have different stage folders."""

from __future__ import annotations

import filecmp
import os
import shutil
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from everest_ds.config import Experiment
from everest_ds.data.data_set import read_data_set
from everest_ds.data.store.index import StoredSamples, open_store, shards_of
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.pack import StorePacker
from everest_ds.data.store.shards import packing_into
from everest_ds.errors import ConfigError, EverestError
from everest_ds.parallel.world import World
from everest_ds.training import preflight
from everest_ds.training.evaluate import run_test
from everest_ds.training.input_files import manifest_of
from everest_ds.training.loop import train
from everest_ds.training.plan import describe_staging
from everest_ds.training.preflight import check_nodes, stage_shards
from tests.ranks import run_ranks
from tests.training.runs import experiment, losses, train_rank
from tests.training.test_resume import stop_and_resume

STAGE = "$EVEREST_TEST_STAGE/frames"


@pytest.fixture(scope="module")
def stores(motion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of the motion data, with stores of the training videos in place of the manifests."""
    out = tmp_path_factory.mktemp("stores")
    samples = read_data_set(motion_data / "train.txt", root=None, num_classes=None, labelled=False)
    with packing_into(out / "train.txt", []):
        packer = StorePacker(samples, motion_data, out / "train.txt", Packing(), 1, 1 << 16)
        packer.pack_all(lambda done: None)
        packer.finish()
    for split in ("val", "test"):
        shutil.copytree(out / "train.txt", out / f"{split}.txt")
    shutil.copy(motion_data / "classes.txt", out)
    return out


@pytest.fixture
def data(stores: Path, tmp_path: Path) -> Path:
    """A copy of the stores, which the test may change."""
    return Path(shutil.copytree(stores, tmp_path / "data"))


def staging(data: Path, folder: Path, task: str = "pretrain", **settings: object) -> Experiment:
    return experiment(data, folder, task, data={"stage": STAGE, **settings}, run={"hang_timeout_s": 60})


def on_node(world: World, place: Path, ranks_per_node: int) -> World:
    """Return the world as a rank sees it on nodes with so many ranks, each with a stage folder in `place`."""
    node = world.rank // ranks_per_node
    os.environ |= {"EVEREST_TEST_STAGE": str(place / f"node{node}"), "SLURMD_NODENAME": f"node{node}"}
    return replace(world, local_rank=world.rank % ranks_per_node, local_size=ranks_per_node)


def stage(world: World, config: Experiment, place: Path, ranks_per_node: int) -> str:
    """Stage as one rank; return the folder that its samples are read from, or the error."""
    here = on_node(world, place, ranks_per_node)
    assert config.data.train is not None
    try:
        samples = stage_shards(config, config.task, open_store(config.data.train), here, config.run.dir)
    except EverestError as error:
        assert error.on_every_rank
        return f"{type(error).__name__}: {error}"
    assert isinstance(samples, StoredSamples)
    return str(samples.shards)


def test_one_rank_of_each_node_copies_the_shards_of_all_splits(data: Path, tmp_path: Path) -> None:
    config = staging(data, tmp_path / "run", "finetune")
    folders = run_ranks(stage, 4, config, tmp_path, 2)
    assert folders[0] == folders[1]
    assert folders[2] == folders[3]
    for node, folder in enumerate(folders[::2]):
        assert Path(folder).parent == tmp_path / f"node{node}" / "frames"
        staged = sorted(file.name for file in Path(folder).parent.glob("*/*"))
        splits = [open_store(data / f"{split}.txt") for split in ("train", "val")]
        assert staged == sorted(shard.name for split in splits for shard in shards_of(split))


def enlarge(shard: Path) -> None:
    """Make a shard larger than the free disk space; it takes no more space than before."""
    os.truncate(shard, shutil.disk_usage(shard).free + (1 << 30))


def with_copy_on_one_node(world: World, config: Experiment, place: Path, shard: Path) -> str:
    """Stage, after the disk has become too small for a shard that only node 0 has already."""
    here = on_node(world, place, 1)
    stage(world, config, place, 1)
    if here.is_main:
        enlarge(shard)
        staged = stage_path(config, shard)
        os.truncate(staged, shard.stat().st_size)
        os.utime(staged, ns=(0, shard.stat().st_mtime_ns))
    world.barrier()
    return stage(world, config, place, 1)


def stage_path(config: Experiment, shard: Path) -> Path:
    (found,) = Path(os.path.expandvars(str(config.data.stage))).glob(f"*/{shard.name}")
    return found


@pytest.mark.slow
def test_too_little_room_is_said_by_all_ranks_and_blames_a_node_if_others_have_room(
    data: Path, tmp_path: Path
) -> None:
    config = staging(data, tmp_path / "run")
    shard = next(iter(shards_of(open_store(data / "train.txt"))))
    for message in run_ranks(with_copy_on_one_node, 2, config, tmp_path, shard):
        assert message.startswith("BadNodeError: node1: too little disk space to stage the shards; given:")
        assert "GiB to copy, " in message
        assert "GiB free; fix: free disk space, name another folder in data.stage" in message
    for message in run_ranks(stage, 2, config, tmp_path / "others", 1):
        assert message.startswith("DataError: node0, node1: too little disk space")


def check(world: World, config: Experiment, place: Path) -> str:
    try:
        return str(check_nodes(config, on_node(world, place, 1)).get("stage"))
    except EverestError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_the_preflight_looks_for_room_on_each_node(data: Path, tmp_path: Path) -> None:
    config = staging(data, tmp_path / "run")
    texts = run_ranks(check, 2, config, tmp_path)
    assert texts[0] == texts[1]
    assert "KiB to copy, " in texts[0]
    assert texts[0].endswith((" on the fullest node, node0", " on the fullest node, node1"))
    enlarge(next(iter(shards_of(open_store(data / "train.txt")))))
    assert run_ranks(check, 2, config, tmp_path)[1].startswith(
        "DataError: node0, node1: too little disk space"
    )


def unset_and_unreadable(world: World, config: Experiment, place: Path) -> list[str]:
    """Stage with a variable that is not set on one node, and from a store with an unreadable shard."""
    other = config.data.model_copy(update={"stage": Path("$NO_SUCH_FOLDER")}) if world.rank else config.data
    return [stage(world, c, place, 1) for c in (config.model_copy(update={"data": other}), config)]


def test_an_error_on_one_node_ends_all_ranks(data: Path, tmp_path: Path) -> None:
    shard = list(shards_of(open_store(data / "train.txt")))[1]
    shard.unlink()
    shard.mkdir()
    for unset, unreadable in run_ranks(unset_and_unreadable, 2, staging(data, tmp_path / "run"), tmp_path):
        assert unset.startswith("ConfigError: data.stage names an environment variable that is not set")
        assert unreadable == f"DataError: {shard}: cannot be read; given: Is a directory"


def with_folders_of_their_own(world: World, config: Experiment, place: Path) -> str:
    here = on_node(world, place, 1)  # a folder for each rank
    samples = open_store(config.data.train or Path())
    try:
        stage_shards(config, config.task, samples, replace(here, local_rank=world.rank, local_size=2))
    except EverestError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_ranks_of_a_node_that_do_not_share_the_folder_are_named(data: Path, tmp_path: Path) -> None:
    for message in run_ranks(with_folders_of_their_own, 2, staging(data, tmp_path / "run"), tmp_path):
        assert message.startswith("rank 1 does not see the staged shards on node1; given: ")


def stopped(world: World, config: Experiment, place: Path, by: str) -> str:
    """Stage from storage that does not answer, until a signal to rank 1 or a file of the run stops it."""
    preflight._POLL_S = 0.05

    def ask() -> None:
        if by == "signal" and world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        if by == "kill" and world.is_main:
            (config.run.dir / "kill").touch()

    timer = threading.Timer(0.3, ask)
    timer.start()
    message = stage(world, config, place, 2)
    timer.join()
    return message


@pytest.mark.parametrize("by", ["signal", pytest.param("kill", marks=pytest.mark.slow)])
def test_a_stop_ends_the_copying_on_all_ranks(data: Path, tmp_path: Path, by: str) -> None:
    config = staging(data, tmp_path / "run")
    config.run.dir.mkdir()
    shards = list(shards_of(open_store(data / "train.txt")))
    shards[0].unlink()
    os.mkfifo(shards[0])
    for message in run_ranks(stopped, 2, config, tmp_path, by):
        assert message.startswith("StoppedError: stopped while shards were copied to the nodes; fix: run")
    assert not list(config.run.dir.iterdir())
    for copy in (tmp_path / "node0").glob("*/*/*.tar"):
        assert filecmp.cmp(copy, data / "train.txt" / "shards" / copy.name, shallow=False)


def train_staged(world: World, config: Experiment, place: Path) -> str:
    train(config, on_node(world, place, 1))
    return (config.run.dir / "logs" / "rank-0.log").read_text()


@pytest.mark.slow
def test_losses_are_the_same_with_and_without_staging(stores: Path, tmp_path: Path) -> None:
    run_ranks(train_rank, 2, experiment(stores, tmp_path / "in-place", "finetune"))
    log = run_ranks(train_staged, 2, staging(stores, tmp_path / "staged", "finetune"), tmp_path)[0]
    assert losses(tmp_path / "staged") == losses(tmp_path / "in-place")
    assert (tmp_path / "staged/excluded.json").read_text() == (
        tmp_path / "in-place/excluded.json"
    ).read_text()
    assert "staging: " in log
    assert "of 2 nodes; " in log


def evaluate_staged(world: World, config: Experiment, place: Path) -> float:
    return float(run_test(config, on_node(world, place, 2))["top1"])


@pytest.mark.slow
def test_a_run_resumes_with_staging_and_is_tested_with_it(stores: Path, tmp_path: Path) -> None:
    """Staging may be turned on between two starts, and the test stages its own store."""
    whole = experiment(stores, tmp_path / "whole", "finetune")
    run_ranks(train_rank, 2, whole)
    run_ranks(stop_and_resume, 2, experiment(stores, tmp_path / "run", "finetune"), 4)
    staged = staging(stores, tmp_path / "run", "finetune")
    run_ranks(train_staged, 2, staged, tmp_path)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    top1 = run_ranks(evaluate_staged, 2, staged, tmp_path / "test")[0]
    assert top1 == run_ranks(evaluate_staged, 2, whole, tmp_path)[0]
    tested = open_store(stores / "test.txt")
    names = sorted(file.name for file in (tmp_path / "test/node0").glob("*/*/*"))
    assert names == sorted(shard.name for shard in shards_of(tested))


def test_the_dry_run_says_what_is_staged(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = staging(data, tmp_path / "run", "finetune")
    shards = [shard for split in ("train", "val") for shard in shards_of(open_store(data / f"{split}.txt"))]
    mib = sum(shard.stat().st_size for shard in shards) / 1024**2
    begin = f"{mib:.2f} MiB in {len(shards)} shards, copied to {STAGE} on each node"
    monkeypatch.delenv("EVEREST_TEST_STAGE", raising=False)
    later = {"stage": f"{begin}, where the free space is checked before training"}
    assert describe_staging(config, "finetune") == later
    monkeypatch.setenv("EVEREST_TEST_STAGE", str(tmp_path))
    assert describe_staging(config, "finetune") == later
    (tmp_path / "frames").mkdir()
    text = describe_staging(config, "finetune")["stage"]
    assert text.startswith(f"{begin}; here, {mib:.2f} MiB to copy, ")
    assert text.endswith(" free")
    enlarge(shards[0])
    assert "; WARNING: too little space here; fix: free disk" in describe_staging(config, "finetune")["stage"]
    assert describe_staging(experiment(data, tmp_path / "run"), "pretrain") == {}


def test_only_stores_are_staged(motion_data: Path, stores: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="data.stage is set, but data.train is not a frame store; given: .*"
    ):
        manifest_of(staging(motion_data, tmp_path), "train")
    tokens = {"score": "pixel"}
    cached = experiment(
        motion_data, tmp_path, tokens=tokens, data={"stage": STAGE, "draws": 1, "token_cache": tmp_path}
    )
    assert manifest_of(cached, "train") == motion_data / "train.txt"
    mixed = staging(stores, tmp_path, "finetune", val=str(motion_data / "val.txt"))
    assert [store.shards.parent for store in preflight.stores_to_stage(mixed, "finetune")] == [
        stores / "train.txt"
    ]
