"""Tests of runs on a frame store: they equal runs on videos that hold its frames without loss."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from everest_ds.cli.app import app
from everest_ds.config import DataConfig, Experiment, dump_experiment
from everest_ds.data.clips import CachedClips, EvaluationClips, TrainingClips
from everest_ds.data.data_set import check_frames, read_data_set
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.order import Visit
from everest_ds.data.store.index import StoredSamples, open_store
from everest_ds.data.store.layout import Packing
from everest_ds.data.store.token_cache import open_token_cache
from everest_ds.data.video_list import Sample, write_manifest
from everest_ds.errors import ConfigError, DataError
from everest_ds.models.selection.packer import Packer
from everest_ds.training.samples import read_samples, read_training_samples
from tests.data.conftest import write_video
from tests.data.store.conftest import pack
from tests.ranks import run_ranks
from tests.training.runs import experiment, losses, train_rank
from tests.training.test_evaluate import train_and_test
from tests.training.test_resume import stop_and_resume

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def twins(motion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders with the same frames, as stores and as manifests of lossless videos."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("stores", "videos")}
    for split in SPLITS:
        pack(motion_data / f"{split}.txt", folders["stores"] / split)
        store = open_store(folders["stores"] / split)
        copies = []
        for sample in store:
            name = sample.path.relative_to(folders["stores"] / split).with_suffix(".mkv")
            file = folders["videos"] / name
            file.parent.mkdir(exist_ok=True)
            with open_sample(sample, DataConfig()) as video:
                pictures = list(video.read(range(video.num_frames)).numpy())
            write_video(file, pictures, "libx264rgb", pix_fmt="rgb24", qp="0")
            copies.append(Sample(file, sample.label))
        write_manifest(folders["videos"] / f"{split}.txt", copies, folders["videos"])
    shutil.copy(motion_data / "classes.txt", folders["videos"])
    return folders


def on_store(config: Experiment, twins: dict[str, Path], folder: Path) -> Experiment:
    """Return the run with its manifests replaced by the stores."""
    data = {split: str(twins["stores"] / split) for split in SPLITS}
    tree = config.model_dump(mode="json")
    return Experiment.model_validate(
        {**tree, "data": {**tree["data"], **data}, "run": {**tree["run"], "dir": str(folder)}}
    )


def damage(sample: Sample) -> None:
    """Flip a bit in the list of the frames of a sample of a store."""
    assert sample.stored is not None
    with open(sample.stored.shard, "r+b") as stream:
        stream.seek(sample.stored.records_at + 130)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


def test_clips_of_a_store_equal_those_of_its_frames(twins: dict[str, Path], tmp_path: Path) -> None:
    data = {"repeats": 2, "horizontal_flip": True, "train_crop": "random_resized"}
    on_videos = experiment(twins["videos"], tmp_path, data=data)
    configs = (on_videos, on_store(on_videos, twins, tmp_path))
    sources = [read_samples(config, "train").samples for config in configs]
    drawn = [TrainingClips(samples, on_videos) for samples in sources]
    views = [EvaluationClips(samples, on_videos, 2, 3) for samples in sources]
    for row in range(len(sources[0])):
        theirs, ours = (clips[Visit(1, row)] for clips in drawn)
        assert not theirs.failures and not ours.failures and len(ours.clips) == 2
        pairs = list(zip(theirs.clips, ours.clips, strict=True))
        theirs, ours = (clips[clips.items_of(row)] for clips in views)
        pairs += zip(theirs.clips, ours.clips, strict=True)
        assert len(pairs) == 8
        assert all(torch.equal(*fields) for pair in pairs for fields in zip(*pair, strict=True))


@pytest.mark.slow
def test_pre_training_on_a_store_even_stopped_equals_that_on_its_frames(
    twins: dict[str, Path], tmp_path: Path
) -> None:
    on_videos = experiment(
        twins["videos"],
        tmp_path / "videos",
        data={"repeats": 2, "horizontal_flip": True, "pack_tokens": True},
        tokens={"score": "pixel"},
        schedule={"epochs": 2},
    )
    run_ranks(train_rank, 1, on_videos)
    run_ranks(stop_and_resume, 2, on_store(on_videos, twins, tmp_path / "store"), 4)
    theirs, ours = losses(tmp_path / "videos"), losses(tmp_path / "store")
    assert ours == pytest.approx(theirs, abs=1e-6)  # two ranks add in another order
    assert len(ours) == 12


@pytest.mark.slow
def test_fine_tuning_and_test_on_a_store_equal_those_on_its_frames(
    twins: dict[str, Path], tmp_path: Path
) -> None:
    data = {"train_crop": "random_resized", "test_crops": 3}
    on_videos = experiment(twins["videos"], tmp_path / "videos", "finetune", data=data)
    config = on_store(on_videos, twins, tmp_path / "store")
    (ours,), (theirs,) = (run_ranks(train_and_test, 1, each) for each in (config, on_videos))
    paths = {"weights", "manifest"}
    assert {k: v for k, v in ours.items() if k not in paths} == {
        k: v for k, v in theirs.items() if k not in paths
    }
    assert losses(tmp_path / "store") == losses(tmp_path / "videos")


def test_a_damaged_sample_is_replaced_named_and_left_out_next_time(motion_data: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    pack(motion_data / "train.txt", store)
    samples = open_store(store)
    damage(samples[3])
    config = on_store(
        experiment(motion_data, tmp_path / "run", data={"max_broken_pct": 10}),
        {"stores": tmp_path},
        tmp_path / "run",
    )
    data = config.data.model_copy(update={"train": store})
    run_ranks(train_rank, 1, config.model_copy(update={"data": data}))
    broken = [json.loads(line) for line in (tmp_path / "run" / "broken.jsonl").read_text().splitlines()]
    assert {row["video"] for row in broken} == {str(store / "train" / "00003.mp4")}
    assert len(broken) == 3  # one for each epoch
    assert "the list of its frames is damaged" in broken[0]["reason"]
    again = read_samples(config.model_copy(update={"data": data}), "train")
    assert [problem.sample for problem in again.excluded] == [samples[3]]


def test_a_cache_of_a_store_holds_the_clips_that_are_read_from_the_store(
    twins: dict[str, Path], motion_data: Path, tmp_path: Path
) -> None:
    store = Path(shutil.copytree(twins["stores"] / "train", tmp_path / "store"))
    damage(open_store(store)[3])
    data = {"train": str(store), "draws": 2, "token_cache": str(tmp_path / "cache"), "repeats": 2}
    data |= {"horizontal_flip": True, "max_broken_pct": 10}
    config = experiment(motion_data, tmp_path / "run", data=data, tokens={"score": "pixel"})
    file = tmp_path / "run.yaml"
    file.write_text(dump_experiment(config))
    done = CliRunner().invoke(app, ["data", "cache", str(file), "--workers", "1"])
    assert done.exit_code == 3 and "00003.mp4" in done.output
    samples = read_training_samples(config, tmp_path / "run" / "excluded.json").samples
    cache = open_token_cache(config, samples)
    assert cache is not None
    from_store, from_cache = (
        TrainingClips(samples, config, Packer(config)),
        CachedClips(samples, config, cache),
    )
    for visit in (Visit(0, 0), Visit(1, 3), Visit(2, 3), Visit(3, 23)):
        read, kept = from_store[visit], from_cache[visit]
        assert kept.failures == read.failures and len(kept.failures) == (visit.sample == 3)
        pairs = zip(kept.clips, read.clips, strict=True)
        assert all(torch.equal(*fields) for pair in pairs for fields in zip(*pair, strict=True))


def test_clips_use_the_smallest_pictures_that_suffice(motion_data: Path, tmp_path: Path) -> None:
    """A crop of half the size comes from halved pictures, and shows the same part of them."""
    pictures = [np.kron(np.eye(8, dtype=np.uint8), np.full((16, 16), 9 * i)) for i in range(8)]
    write_video(tmp_path / "a.mkv", [np.stack([p] * 3, -1).astype(np.uint8) for p in pictures], crf="1")
    (tmp_path / "list.txt").write_text("a.mkv\n")
    pack(tmp_path / "list.txt", tmp_path / "store", Packing(quality=100))
    sections = {"data": {"frame_stride": 1, "train_crop": "center", "decoder": "pyav"}}
    config = experiment(motion_data, tmp_path, **sections)
    clips = []
    for source in ("list.txt", "store"):
        samples = read_data_set(tmp_path / source, root=None, num_classes=None, labelled=False)
        clips.append(TrainingClips(samples, config)[Visit(0, 0)].clips[0].clip.float())
    assert clips[0].shape == clips[1].shape == (4, 32, 32, 3)
    assert (clips[0] - clips[1]).abs().mean() < 2


def test_a_stride_that_the_kept_frames_cannot_give_is_refused(motion_data: Path, tmp_path: Path) -> None:
    pack(motion_data / "val.txt", tmp_path / "store", Packing(every=2))
    samples = open_store(tmp_path / "store")
    assert isinstance(samples, StoredSamples)
    check_frames(samples, tmp_path / "store", DataConfig(frame_stride=4))
    check_frames(samples, tmp_path / "store", DataConfig(frame_stride=3, sampling="segments"))
    with pytest.raises(
        ConfigError, match="data.frame_stride does not suit the frame store .*store; given: 3"
    ):
        check_frames(samples, tmp_path / "store", DataConfig(frame_stride=3))


def test_labels_of_a_store_are_checked_as_those_of_a_manifest(motion_data: Path, tmp_path: Path) -> None:
    pack(motion_data / "val.txt", tmp_path / "store")
    with pytest.raises(DataError, match=r"store: label out of range; given: [3-5]; allowed: 0..2"):
        read_data_set(tmp_path / "store", root=None, num_classes=3, labelled=True)
    (tmp_path / "list.txt").write_text(f"{motion_data}/val/00000.mp4\n")
    pack(tmp_path / "list.txt", tmp_path / "bare")
    with pytest.raises(DataError, match="bare: no label; given: .*val/00000.mp4"):
        read_data_set(tmp_path / "bare", root=None, num_classes=3, labelled=True)
