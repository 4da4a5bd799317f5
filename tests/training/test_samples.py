"""Tests of the samples of a run: videos that the ledger lists as broken are excluded from the start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from everest_ds.config import Experiment
from everest_ds.data.ledger import Ledger
from everest_ds.data.video_list import Sample, read_manifest
from everest_ds.errors import DataError
from everest_ds.parallel.world import World
from everest_ds.training.evaluate import run_test
from everest_ds.training.samples import read_samples, read_training_samples, record_excluded
from tests.ranks import run_ranks

from .runs import experiment, metrics, train_rank


@pytest.fixture
def data(motion_data: Path, tmp_path: Path) -> Path:
    """Return a copy of the motion data, whose ledgers the test may write."""
    return Path(shutil.copytree(motion_data, tmp_path / "data"))


def break_video(data: Path, split: str, number: int, reason: str = "cut off") -> Sample:
    """Record in the ledger that a video is broken, and return its sample."""
    manifest = data / f"{split}.txt"
    sample = read_manifest(manifest, root=None, num_classes=6, labelled=True)[number]
    Ledger.of_manifest(manifest).record(sample, reason)
    return sample


def test_broken_and_short_videos_are_left_out_by_name(data: Path, tmp_path: Path) -> None:
    config = experiment(data, tmp_path / "run")
    everything = read_samples(config, "train").samples
    broken, short = break_video(data, "train", 3), everything[5]
    Ledger.of_manifest(data / "train.txt").record(short, "", num_frames=6)  # 4 frames at stride 2 take 7
    usable = read_samples(config, "train")
    assert usable.samples == [s for s in everything if s.path not in (broken.path, short.path)]
    assert [p.reason.split(";")[0] for p in usable.excluded] == ["cut off", "too short"]


def test_what_a_run_leaves_out_stays_whatever_the_ledger_learns(data: Path, tmp_path: Path) -> None:
    config, settled = experiment(data, tmp_path / "run"), tmp_path / "excluded.json"
    break_video(data, "train", 3)
    first = read_training_samples(config, settled)
    record_excluded(first, settled)
    break_video(data, "train", 9)
    again = read_training_samples(config, settled)
    assert again == first
    lines = (data / "train.txt").read_text().splitlines()
    (data / "train.txt").write_text("\n".join(lines[:3] + lines[4:]))
    with pytest.raises(DataError, match="the manifest has changed since the run began"):
        read_training_samples(config, settled)


def test_a_manifest_of_broken_videos_only_is_refused(data: Path, tmp_path: Path) -> None:
    for number in range(12):
        break_video(data, "val", number)
    with pytest.raises(DataError, match=r"all samples are broken; given: .*00000\.mp4: cut off"):
        read_samples(experiment(data, tmp_path, "finetune"), "val")


def result_of(world: World, config: Experiment) -> dict[str, object]:
    """Run the multi-view test on this rank."""
    return run_test(config, world)


@pytest.mark.slow
def test_training_goes_on_without_them_and_tests_say_how_many_are_missing(data: Path, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        sample = break_video(data, split, 1)
        sample.path.write_bytes(b"")  # opening this video would stop the run
        break_video(data, split, 1)
    config = experiment(data, tmp_path / "run", "finetune", schedule={"epochs": 1, "warmup_epochs": 0})
    run_ranks(train_rank, 1, config)
    (row,) = [row for row in metrics(tmp_path / "run") if "val_top1" in row]
    assert row["val_missing"] == 1
    (result,) = run_ranks(result_of, 1, config)
    assert (result["num_clips"], result["num_missing"]) == (11, 1)
    assert [Path(name).name for name in result["missing"]] == ["00001.mp4"]
