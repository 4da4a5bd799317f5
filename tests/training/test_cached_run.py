"""Tests of runs on a token cache, staged or in place: bit-equal to runs that decode, also when resumed."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from everest_ds.config import Experiment
from everest_ds.data import clips
from everest_ds.data.clips import CachedClips
from everest_ds.data.order import Visit
from everest_ds.data.store.fill_cache import CacheFiller
from everest_ds.data.store.index import shards_of
from everest_ds.data.store.shards import SHARD_BYTES
from everest_ds.data.store.staging import read_from_stage
from everest_ds.data.store.token_cache import TokenCache
from everest_ds.errors import DataError
from everest_ds.log import logger
from everest_ds.models.selection.packer import Packer
from everest_ds.parallel.world import World
from everest_ds.training.input_files import stores_to_stage
from everest_ds.training.loop import train
from everest_ds.training.plan import describe_staging
from everest_ds.training.run_folder import RunFolder
from everest_ds.training.samples import read_samples, read_training_samples
from everest_ds.units import format_bytes
from tests.data.store.test_staging import stage
from tests.ranks import run_ranks
from tests.training.faults import replaced
from tests.training.runs import experiment, losses, train_rank


def run(
    data: Path, folder: Path, cache: Path | None, stage: Path | None = None, /, **sections: dict[str, Any]
) -> Experiment:
    """Return a run that cycles through two draws, in three epochs, and reads `cache` if it is given."""
    ours = {"draws": 2, "train_crop": "multi_scale", "token_cache": cache, "stage": stage}
    return experiment(data, folder, tokens={"score": "pixel"}, data=ours, **sections)


def fill_cache(config: Experiment, shard_bytes: int = SHARD_BYTES) -> None:
    """Fill the token cache of a run, as `everest-ds data cache` does."""
    assert config.data.token_cache is not None
    samples = read_training_samples(config, RunFolder(config.run.dir).excluded).samples
    filler = CacheFiller(config, samples, Packer(config), config.data.token_cache, shard_bytes)
    filler.fill(lambda done: None)
    filler.finish()


def train_from(world: World, config: Experiment) -> None:
    """Train, and check that every draw is read from the copies, if the cache is staged."""

    def check(read: Callable[..., Any]) -> Callable[..., Any]:
        def checked(cache: TokenCache, draw: Visit) -> Any:
            assert config.data.stage is None or cache.shards.parent == config.data.stage
            return read(cache, draw)

        return checked

    with replaced(clips, "read_draw", check):
        train(config, world)


@pytest.mark.slow  # half a minute on a busy machine
def test_two_ranks_on_a_cache_train_as_two_that_decode_and_may_be_stopped_between(
    motion_data: Path, tmp_path: Path
) -> None:
    fill_cache(run(motion_data, tmp_path / "decoded", tmp_path / "cache"))
    run_ranks(train_rank, 2, run(motion_data, tmp_path / "decoded", None))
    # The first steps decode, and the rest of the second epoch and the third read the staged cache.
    both, node = tmp_path / "both", tmp_path / "node"
    for cache, folder, steps in ((None, None, 4), (tmp_path / "cache", node, None)):
        settings = {"dir": str(both), "max_steps": steps}
        run_ranks(train_from, 2, run(motion_data, both, cache, folder, run=settings))
    assert losses(both) == losses(tmp_path / "decoded")
    assert len(losses(both)) == 9
    (copy,) = node.glob("*/*")
    assert filecmp.cmp(copy, tmp_path / "cache" / "shards" / copy.name, shallow=False)


def test_a_cache_is_staged_once_and_read_from_its_copies(motion_data: Path, tmp_path: Path) -> None:
    node = tmp_path / "node"
    config = run(motion_data, tmp_path / "run", tmp_path / "cache", node)
    fill_cache(config, shard_bytes=50_000)
    (cache,) = stores_to_stage(config, "pretrain")
    assert isinstance(cache, TokenCache)
    shards = shards_of(cache)
    sizes = [shard.stat().st_size for shard in shards]
    planned = describe_staging(config, "pretrain")["stage"]
    assert planned.startswith(f"{format_bytes(sum(sizes))} in {len(shards)} shards, copied to {node} on each")
    assert len(shards) > 3 and stage(cache, node).copied_bytes == sum(sizes)
    staged = read_from_stage(cache, node)
    copies = shards_of(staged)
    copies[1].unlink()
    copies[2].write_bytes(b"half a copy")
    assert stage(cache, node).copied_bytes == sum(sizes[1:3])
    samples = read_samples(config, "train").samples
    visits = [Visit(epoch, sample) for epoch in (0, 3) for sample in range(24)]
    in_place = CachedClips(samples, config, cache)
    wanted = [in_place[visit].clips[0].clip for visit in visits]
    shutil.rmtree(tmp_path / "cache")
    from_copies = CachedClips(samples, config, staged)
    assert all(from_copies[v].clips[0].clip.equal(w) for v, w in zip(visits, wanted, strict=True))


def test_copies_of_a_cache_are_checked_draw_by_draw(
    motion_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger, "propagate", True)
    config = run(motion_data, tmp_path / "run", tmp_path / "cache", tmp_path / "node")
    fill_cache(config)
    (cache,) = stores_to_stage(config, "pretrain")
    (shard,) = shards_of(cache)
    with open(shard, "r+b") as stream:
        for draw in (0, 3, 47):  # of 24 samples with two draws
            stream.seek(shard.stat().st_size // 48 * draw + 600)
            stream.write(b"damage")
    stage(cache, tmp_path / "node")
    assert [record.getMessage() for record in caplog.records] == [
        f"{shard}: damaged samples or draws in this shard: 3"
    ]
    shard.unlink()
    with pytest.raises(
        DataError, match=r"0.tar: this shard of the token cache is missing; fix: .*data cache"
    ):
        stage(cache, tmp_path / "node")
