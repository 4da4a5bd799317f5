"""Tests of videos that turn out unreadable during a run: they are replaced, counted and recorded."""

from __future__ import annotations

import json
from pathlib import Path

from everest_ds.config import Experiment
from everest_ds.parallel.world import World
from everest_ds.training.evaluate import run_test
from everest_ds.training.loop import train
from everest_ds.training.samples import read_training_samples
from tests.ranks import run_ranks
from tests.training.runs import experiment, losses, metrics, train_rank
from tests.training.test_resume import stop_and_resume


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
