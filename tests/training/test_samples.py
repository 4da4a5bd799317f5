"""Tests of the samples of a run: broken videos are excluded, unreadable ones replaced and recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from everest_ds.config import Experiment
from everest_ds.data.ledger import Ledger
from everest_ds.data.video_list import Sample, read_manifest
from everest_ds.errors import DataError
from everest_ds.parallel.world import World
from everest_ds.training.evaluate import run_test
from everest_ds.training.loop import train
from everest_ds.training.samples import read_samples, read_training_samples, record_excluded
from tests.ranks import run_ranks
from tests.training.runs import experiment, losses, metrics, train_rank
from tests.training.test_resume import stop_and_resume


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


def train_and_test(world: World, config: Experiment) -> dict[str, object]:
    train(config, world)
    return run_test(config, world)


def with_a_broken_video(data: Path, folder: Path, split: str) -> Path:
    """Write a copy of a manifest in which the first video is empty, and return its path."""
    folder.mkdir(exist_ok=True)
    (folder / "empty.mp4").touch()
    first, *rest = (data / f"{split}.txt").read_text().splitlines()
    lines = [f"{folder / 'empty.mp4'} {first.split()[1]}", *(f"{data / line}" for line in rest)]
    (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder / f"{split}.txt"


def test_a_run_goes_on_without_a_broken_video_and_replays_after_a_stop(
    motion_data: Path, tmp_path: Path
) -> None:
    whole, parts = (
        experiment(motion_data, tmp_path / name / "run", data={"train": str(manifest), "max_broken_pct": 5.0})
        for name in ("whole", "parts")
        for manifest in [with_a_broken_video(motion_data, tmp_path / name, "train")]
    )
    run_ranks(train_rank, 1, whole)
    run_ranks(stop_and_resume, 2, parts, 5)
    assert losses(whole.run.dir) == losses(parts.run.dir)
    for run in (whole.run.dir, parts.run.dir):
        rows = [json.loads(line) for line in (run / "broken.jsonl").read_text().splitlines()]
        assert [(row["epoch"], row["slot"], row["sample"]) for row in rows] == [(e, 0, 0) for e in range(3)]
        counts = [row["replaced_videos"] for row in metrics(run)]
        assert len(counts) == 9 and counts == sorted(counts[:3]) + sorted(counts[3:6]) + sorted(counts[6:])
        assert counts[2] == counts[5] == counts[8] == 1


def test_evaluation_says_how_many_videos_are_missing(motion_data: Path, tmp_path: Path) -> None:
    test = with_a_broken_video(motion_data, tmp_path, "test")
    augment = {"rand_augment_ops": 4, "erase_probability": 0.5, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    config = experiment(motion_data, tmp_path / "run", "finetune", data={"test": str(test)}, augment=augment)
    results = run_ranks(train_and_test, 2, config)
    assert results[0] == results[1] and results[0]["num_clips"] == 11 and results[0]["num_missing"] == 1
    assert list(results[0]["missing"]) == [str(tmp_path / "empty.mp4")]


def test_the_next_run_leaves_out_what_this_one_found_broken(motion_data: Path, tmp_path: Path) -> None:
    manifest = with_a_broken_video(motion_data, tmp_path, "train")
    data = {"train": str(manifest), "max_broken_pct": 5.0}
    (this, following) = (experiment(motion_data, tmp_path / name, data=data) for name in ("this", "next"))
    run_ranks(train_rank, 1, this)
    # The same run would still read the video if it were resumed.
    assert read_training_samples(this, this.run.dir / "excluded.json").excluded == []
    (problem,) = read_training_samples(following, following.run.dir / "excluded.json").excluded
    assert problem.sample.path == tmp_path / "empty.mp4" and "empty" in problem.reason
