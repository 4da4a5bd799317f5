"""Tests of the way from a folder of videos to a model, by the commands that `data index` prints."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from everest_ds.config import load_experiment
from tests.cli.test_cli import run_main

TINY = [
    *["model.backbone=vit_tiny", "model.image_size=32", "model.patch_size=8", "model.num_frames=4"],
    *["schedule.epochs=1", "schedule.warmup_epochs=0", "data.num_workers=0", "precision=fp32"],
]


@pytest.fixture
def index(
    motion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> list[list[str]]:
    """Index a folder of three classes in the working folder `tmp_path`, and return the printed commands."""
    monkeypatch.chdir(tmp_path)
    for number, line in enumerate((motion_data / "train.txt").read_text().splitlines()[:15]):
        folder = tmp_path / "my clips" / ("left turn", "right", "up")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(motion_data / line.split()[0], folder / f"#{number} v.mp4")
    (tmp_path / "my clips" / "up" / "._0.mp4").write_bytes(b"fork")
    (tmp_path / "my clips" / "up" / "notes.txt").touch()
    words = ["data", "index", "my clips", "--out", "my lists", "--json", "index.json"]
    assert run_main(monkeypatch, *words) == 0
    printed = capsys.readouterr()
    assert "15 videos of 3 classes" in printed.out
    assert "skipped hidden files: 1, such as up/._0.mp4" in printed.err
    assert [len(paths) for paths in json.loads(Path("index.json").read_text())["skipped"].values()] == [1, 1]
    lines = [line for line in printed.out.splitlines() if line.startswith("  everest-ds ")]
    return [shlex.split(line)[1:] for line in lines]


def test_the_printed_commands_name_the_manifest_and_recipes_that_were_written(index: list[list[str]]) -> None:
    assert index == [
        ["data", "check", "my lists/train.txt"],
        ["pretrain", "my lists/pretrain.yaml"],
        ["finetune", "my lists/finetune.yaml"],
    ]
    config = load_experiment(index[2][1])
    assert (config.model.num_classes, config.data.class_names) == (3, Path("my lists/classes.txt").absolute())


@pytest.mark.slow
def test_the_printed_commands_check_plan_and_train(
    index: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run_main(monkeypatch, *index[0]) == 0
    for words in index[1:]:  # before there are weights of a smaller model, which would not fit
        assert run_main(monkeypatch, *words, "--dry-run") == 0
    for words in index[1:]:
        assert run_main(monkeypatch, *words, *TINY, "--nproc", "1") == 0
    assert run_main(monkeypatch, "evaluate", "runs/my clips_finetune", "--nproc", "1") == 0
    result = json.loads((tmp_path / "runs" / "my clips_finetune" / "evaluation.json").read_text())
    assert result["num_clips"] == 1
