"""Tests of token caches: the clips of training, kept exactly, through crashes, damage and full disks."""

from __future__ import annotations

import io
import os
import resource
import shutil
import signal
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from everest_ds.cli.app import app
from everest_ds.config import Experiment, dump_experiment, plan_ranks
from everest_ds.data.clips import CachedClips, TrainingClips, training_batches
from everest_ds.data.order import Visit, sample_key
from everest_ds.data.store.fill_cache import CacheFiller
from everest_ds.data.store.token_cache import DrawShape, TokenCache, open_token_cache
from everest_ds.data.video_list import Sample, read_manifest
from everest_ds.errors import ConfigError, DataError
from everest_ds.models.selection.packer import Packer
from everest_ds.units import format_bytes
from tests.training.runs import experiment

DRAWS = 3
AUGMENTED = {"draws": DRAWS, "train_crop": "multi_scale", "horizontal_flip": True, "num_workers": 0}


def cached(data: Path, folder: Path, /, **sections: dict[str, Any]) -> Experiment:
    """Return the config of a run from a token cache in `folder`."""
    ours = {"token_cache": folder / "cache", **AUGMENTED, **sections.pop("data", {})}
    tokens = {"score": "pixel", **sections.pop("tokens", {})}
    return experiment(data, folder / "run", tokens=tokens, data=ours, **sections)


def samples_of(config: Experiment) -> list[Sample]:
    assert config.data.train is not None
    return list(read_manifest(config.data.train, root=None, num_classes=6, labelled=True))


def fill(config: Experiment, shard_bytes: int = 1 << 20) -> CacheFiller:
    """Fill the cache of a config, as the command does, and return the finished filler."""
    assert config.data.token_cache is not None
    filler = CacheFiller(
        config, samples_of(config), Packer(config), config.data.token_cache, shard_bytes=shard_bytes
    )
    filler.verify(lambda done: None)
    filler.fill(lambda done: None)
    filler.finish()
    return filler


def opened(config: Experiment) -> TokenCache:
    cache = open_token_cache(config, samples_of(config))
    assert cache is not None
    return cache


def of_visit(clips: TrainingClips, visit: Visit) -> list[list[Tensor]]:
    return [list(clip) for clip in clips[visit].clips]


def same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for these, those in pairs for a, b in zip(these, those, strict=True))


@pytest.mark.parametrize("repeats", [1, 2])
def test_cached_clips_are_those_of_the_draws_with_a_fresh_key_each_epoch(
    motion_data: Path, tmp_path: Path, repeats: int
) -> None:
    config = cached(motion_data, tmp_path, data={"repeats": repeats})
    fill(config, shard_bytes=100_000)
    assert len(list((tmp_path / "cache" / "shards").glob("*.tar"))) > 1
    samples = samples_of(config)
    clips = CachedClips(samples, config, opened(config))
    endless = config.model_copy(update={"data": config.data.model_copy(update={"draws": None})})
    reference = TrainingClips(samples, endless, Packer(config))
    for epoch, sample in ((0, 0), (2, 23), (3, 23), (7, 5), (8, 5)):
        first = of_visit(reference, Visit(epoch % DRAWS, sample))
        for repeat, clip in enumerate(first):
            clip[2] = torch.tensor(sample_key(config.run.seed, epoch, sample, repeat))
        assert same(of_visit(clips, Visit(epoch, sample)), first)
    assert not same(of_visit(clips, Visit(0, 5)), of_visit(clips, Visit(1, 5)))


def test_ordinary_tools_read_a_cache_whose_size_was_known_before(motion_data: Path, tmp_path: Path) -> None:
    config = cached(motion_data, tmp_path)
    filler = CacheFiller(config, samples_of(config), Packer(config), tmp_path / "cache")
    predicted = filler.estimate().num_bytes
    fill(config)
    (shard,) = (tmp_path / "cache" / "shards").glob("*.tar")
    with tarfile.open(shard) as archive:
        assert predicted == shard.stat().st_size - 1024  # the two empty blocks that end a tar file
        arrays = [
            np.load(io.BytesIO(member.read()))
            for end in ("", ".kept")
            if (member := archive.extractfile(f"00000007/draw.02{end}.npy"))
        ]
    clip = TrainingClips(samples_of(config), config, Packer(config))[Visit(2, 7)].clips[0]
    assert np.array_equal(arrays[0][0], clip.clip) and np.array_equal(arrays[1][0], clip.kept)
    listed = (tmp_path / "cache" / "samples.csv").read_text().splitlines()
    assert listed[8].endswith("train/00007.mp4,1,00000.tar,00000007")


def test_the_size_of_many_shards_is_predicted_also_when_filling_resumes(
    motion_data: Path, tmp_path: Path
) -> None:
    config, shards = cached(motion_data, tmp_path), tmp_path / "cache" / "shards"

    def new_filler() -> CacheFiller:
        return CacheFiller(config, samples_of(config), Packer(config), tmp_path / "cache", shard_bytes=50_000)

    def interrupt(done: int) -> None:
        if done == 9:
            raise KeyboardInterrupt

    def num_bytes() -> int:
        """Return the size of the shards without the two empty blocks that end a tar file."""
        return sum(shard.stat().st_size - 1024 for shard in shards.glob("*.tar"))

    predicted = new_filler().estimate().num_bytes
    with pytest.raises(KeyboardInterrupt):
        new_filler().fill(interrupt)
    resumed = new_filler()
    assert resumed.num_left == 15 and resumed.estimate().num_bytes == predicted - num_bytes()
    resumed.fill(lambda done: None)
    assert num_bytes() == resumed.finish()["bytes"] == predicted and len(list(shards.iterdir())) > 5


@pytest.mark.parametrize("place", [100, 700, -700])  # a header, a tubelet, and an index or padding
def test_a_damaged_draw_is_named_replaced_and_repaired(motion_data: Path, tmp_path: Path, place: int) -> None:
    config = cached(motion_data, tmp_path)
    fill(config)
    shard, start = opened(config).place(Visit(1, 4))
    intact = shard.read_bytes()
    with open(shard, "r+b") as stream:
        stream.seek(start + place % DrawShape.of(config).num_bytes)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    clips = CachedClips(samples_of(config), config, opened(config))
    loaded = clips[Visit(4, 4)]  # draw 1
    (failure,) = loaded.failures
    assert failure.sample == failure.slot == 4 and failure.epoch == 4 and not failure.damaged
    assert "draw 1 of sample 4 is damaged" in failure.reason and "data cache" in failure.reason
    assert loaded.clips[0].item != 4
    assert not clips[Visit(0, 4)].failures and not clips[Visit(1, 3)].failures
    assert fill(config).num_known == 23
    assert not CachedClips(samples_of(config), config, opened(config))[Visit(1, 4)].failures
    repaired, there = opened(config).place(Visit(1, 4))
    size = DrawShape.of(config).num_bytes
    assert repaired.read_bytes()[there : there + size] == intact[start : start + size]


def test_killed_at_random_moments_a_cache_is_completed_and_the_same(
    motion_data: Path, tmp_path: Path
) -> None:
    config, whole = cached(motion_data, tmp_path / "killed"), cached(motion_data, tmp_path / "whole")
    fill(whole)
    rng, kills = np.random.default_rng(0), 0
    for _ in range(5):
        child = os.fork()
        if child == 0:
            fill(config, shard_bytes=100_000)
            os._exit(0)
        time.sleep(rng.uniform(0.02, 0.2))
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        kills += os.waitpid(child, 0)[1] != 0
    fill(config)
    assert kills
    for sample in range(24):
        for draw in range(DRAWS):
            contents = []
            for one in (config, whole):
                shard, start = opened(one).place(Visit(draw, sample))
                contents.append(shard.read_bytes()[start : start + DrawShape.of(one).num_bytes])
            assert contents[0] == contents[1]


@contextmanager
def smaller_disk(num_bytes: int) -> Iterator[None]:
    """Limit the size of the files that this process may write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_the_command_resumes(motion_data: Path, tmp_path: Path) -> None:
    config = cached(motion_data, tmp_path)
    with smaller_disk(200_000), pytest.raises(DataError, match="cannot be written.*free disk space"):
        fill(config)
    with pytest.raises(DataError, match="not a complete token cache.*data cache"):
        opened(config)
    assert fill(config).num_known > 0
    assert not CachedClips(samples_of(config), config, opened(config))[Visit(0, 23)].failures


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": {"frame_stride": 1}}, r"data.frame_stride=1 \(in the cache: 2\)"),
        ({"data": {"horizontal_flip": False}}, r"data.horizontal_flip=False \(in the cache: True\)"),
        ({"tokens": {"keep_ratio": 0.75}}, r"tokens.keep_ratio=0.75 \(in the cache: 0.5\)"),
        ({"run": {"seed": 5}}, r"run.seed=5 \(in the cache: 0\)"),
        ({"data": {"draws": 4}}, r"data.draws=4 \(in the cache: 3\).*allowed: 1 to 3"),
    ],
)
def test_a_run_with_other_settings_is_refused_by_key_and_values(
    filled: Experiment, motion_data: Path, changed: dict[str, Any], said: str
) -> None:
    assert filled.data.token_cache is not None
    other = cached(motion_data, filled.data.token_cache.parent, **changed)
    with pytest.raises(ConfigError, match=said):
        opened(other)
    with pytest.raises(ConfigError, match="in the cache"):
        CacheFiller(other, samples_of(other), Packer(other), filled.data.token_cache)


def test_other_samples_are_refused_and_fewer_draws_are_not(filled: Experiment, motion_data: Path) -> None:
    assert filled.data.token_cache is not None
    with pytest.raises(DataError, match="23 samples in data.train now; allowed: the 24 samples"):
        open_token_cache(filled, samples_of(filled)[1:])
    fewer = cached(motion_data, filled.data.token_cache.parent, data={"draws": 1})
    one = CachedClips(samples_of(fewer), fewer, opened(fewer))
    every = CachedClips(samples_of(filled), filled, opened(filled))
    assert torch.equal(one[Visit(5, 2)].clips[0].clip, every[Visit(0, 2)].clips[0].clip)


@pytest.fixture(scope="module")
def filled(motion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """The config of a run whose cache is filled."""
    config = cached(motion_data, tmp_path_factory.mktemp("filled"))
    fill(config)
    return config


def test_a_broken_video_is_replaced_and_reported_as_without_a_cache(
    motion_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(motion_data, tmp_path / "data")
    (tmp_path / "data" / "train" / "00003.mp4").write_bytes(b"no video")
    config = cached(tmp_path / "data", tmp_path, data={"max_broken_pct": 10})
    fill(config)
    samples = samples_of(config)
    sources = TrainingClips(samples, config, Packer(config)), CachedClips(samples, config, opened(config))
    for visit in (Visit(0, 3), Visit(4, 3), Visit(4, 2)):
        decoded, read = (source[visit] for source in sources)
        assert read.failures == decoded.failures and len(read.failures) == (visit.sample == 3)
        assert same(*([list(clip) for clip in loaded.clips] for loaded in (decoded, read)))
    strict = cached(tmp_path / "data", tmp_path / "strict")
    with pytest.raises(DataError, match="too many videos.*00003.mp4.*1 % of 24"):
        fill(strict)


def test_the_loader_delivers_the_batches_of_a_cache(filled: Experiment) -> None:
    samples, plan = samples_of(filled), plan_ranks(filled, 2)
    data = filled.data.model_copy(update={"num_workers": 2})
    config = filled.model_copy(update={"data": data})

    def batches(cache: TokenCache | None, pack: Packer | None) -> list[list[Tensor]]:
        steps = range(8, 14)  # from the middle of epoch 2
        found = training_batches(samples, config, plan, 1, steps, False, print, pack, cache)
        return [list(batch) for batch in found]

    assert same(batches(opened(filled), None), batches(None, Packer(filled)))


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
def test_a_run_resumes_on_other_ranks_with_the_clips_that_it_would_have_decoded(
    filled: Experiment, ranks: tuple[int, int]
) -> None:
    samples, stop = samples_of(filled), 4  # in the middle of epoch 1

    def clips(num_ranks: int, steps: range, cache: TokenCache | None) -> list[list[Tensor]]:
        """Return the clips of these steps in the order in which the steps name them."""
        plan = plan_ranks(filled, num_ranks)
        pack = Packer(filled) if cache is None else None
        shares = [
            list(training_batches(samples, filled, plan, rank, steps, False, print, pack, cache))
            for rank in range(num_ranks)
        ]
        batches = [batch for of_ranks in zip(*shares, strict=True) for batch in of_ranks]
        return [list(clip) for batch in batches for clip in zip(*batch, strict=True)]

    parts = zip(ranks, (range(stop), range(stop, 11)), strict=True)
    resumed = [clip for num_ranks, steps in parts for clip in clips(num_ranks, steps, opened(filled))]
    assert len(resumed) == 8 * 11 and same(resumed, clips(1, range(11), None))


def test_the_command_fills_what_its_config_names(motion_data: Path, tmp_path: Path) -> None:
    config = cached(motion_data, tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(dump_experiment(config))
    runner = CliRunner()
    planned = runner.invoke(app, ["data", "cache", str(file), "--dry-run", "--workers", "1"])
    assert planned.exit_code == 0 and not (tmp_path / "cache").exists()
    assert format_bytes(24 * DRAWS * DrawShape.of(config).num_bytes) in planned.output
    done = runner.invoke(app, ["data", "cache", str(file), "--workers", "1"])
    assert done.exit_code == 0 and "there already" in done.output
    assert opened(config).checksum.shape == (24, DRAWS)
    unnamed = runner.invoke(app, ["data", "cache", str(file), "data.token_cache=null"])
    assert isinstance(unnamed.exception, ConfigError) and "data.token_cache=FOLDER" in str(unnamed.exception)
