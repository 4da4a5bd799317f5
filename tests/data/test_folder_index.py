"""Tests of the recipes for a folder of videos: they load, and fit the number of videos and of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from everest_ds.config import load_experiment, plan_ranks
from everest_ds.data.folder_index import folder_recipes, write_folder_index
from everest_ds.data.order import steps_per_epoch
from everest_ds.data.video_list import Sample, read_class_names, read_manifest
from everest_ds.errors import DataError


@pytest.mark.parametrize("num_train", [1, 3, 7, 48, 1000, 9537, 240_436, 10**6])
def test_batch_and_schedule_fit_the_number_of_videos(tmp_path: Path, num_train: int) -> None:
    splits = {split: tmp_path / f"{split}.txt" for split in ("train", "val", "test")}
    for task, tree in folder_recipes("clips", splits, num_train, tmp_path / "classes.txt", 3).items():
        file = tmp_path / f"{task}.yaml"
        file.write_text(yaml.safe_dump(tree))
        config = load_experiment(file)
        batch = config.batch.global_batch_size
        assert batch is not None and config.task == task
        for ranks in (ranks for ranks in (1, 2, 4, 8) if batch % ranks == 0):
            assert steps_per_epoch(num_train, plan_ranks(config, ranks)) >= min(4, num_train)
        assert num_train < 4 or num_train / 8 < batch or batch == {"pretrain": 256, "finetune": 128}[task]
        assert config.schedule.epochs > config.schedule.warmup_epochs
        if task == "pretrain":
            assert 800 <= config.schedule.epochs <= 3200
            assert config.schedule.epochs in (800, 3200) or num_train * config.schedule.epochs < 32e6
        else:
            assert config.model.init_from == Path("runs/clips_pretrain") and config.model.num_classes == 3


def test_splits_without_videos_are_left_out_of_the_recipes(tmp_path: Path) -> None:
    samples = [Sample(tmp_path / f"{n}.mp4", n % 2) for n in range(8)]
    recipes = write_folder_index(tmp_path, "x", {"train": samples, "val": [], "test": []}, ["a", "b"])
    config = load_experiment(recipes["finetune"])
    assert (config.data.val, config.data.test) == (None, None) and not (tmp_path / "val.txt").exists()
    assert read_manifest(tmp_path / "train.txt", root=None, num_classes=2, labelled=True) == samples
    write_folder_index(tmp_path, "x", {"train": samples[:6], "val": [], "test": samples[6:]}, ["a", "b"])
    config = load_experiment(recipes["finetune"])
    assert config.data.val == config.data.test == tmp_path / "test.txt"
    with pytest.raises(DataError, match="no video is left for training; given: 8 videos"):
        write_folder_index(tmp_path, "x", {"train": [], "val": samples, "test": []}, ["a", "b"])


def test_one_class_can_only_be_pre_trained_on(tmp_path: Path) -> None:
    samples = [Sample(tmp_path / f"{n}.mp4", 0) for n in range(8)]
    recipes = write_folder_index(tmp_path, "x", {"train": samples, "val": [], "test": []}, ["a"])
    assert list(recipes) == ["pretrain"] and not (tmp_path / "finetune.yaml").exists()
    assert read_class_names(tmp_path / "classes.txt") == ["a"]


def test_a_recipe_that_was_edited_is_kept_beside_the_new_one(tmp_path: Path) -> None:
    splits = {"train": [Sample(tmp_path / f"{n}.mp4", n % 2) for n in range(8)]}
    file = write_folder_index(tmp_path, "x", splits, ["a", "b"])["pretrain"]
    written = file.read_text()
    write_folder_index(tmp_path, "x", splits, ["a", "b"])
    assert not list(tmp_path.glob("*.bak"))
    file.write_text("# mine\n")
    write_folder_index(tmp_path, "x", splits, ["a", "b"])
    assert file.read_text() == written and (tmp_path / "pretrain.yaml.bak").read_text() == "# mine\n"
