"""Tests of `everest-ds visualize`: the pictures of a recipe and of trained weights, also in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from everest_ds.data.decoding.open_video import open_video
from tests.cli.test_cli import run_main, write_config
from tests.ranks import run_ranks
from tests.training.runs import experiment, train_rank


def test_a_recipe_without_weights_is_drawn(
    monkeypatch: pytest.MonkeyPatch, motion_data: Path, tmp_path: Path
) -> None:
    config, video = write_config(motion_data, tmp_path), next(motion_data.rglob("*.mp4"))
    command = ("visualize", str(config), str(video), "tokens.frame_oversampling=2", "--out", str(tmp_path))
    assert run_main(monkeypatch, *command) == 0
    side = 32 + 2  # a frame and its white line
    assert imread(tmp_path / "kept_tokens.png").shape[:2] == (2 * side, 2 * side)
    assert imread(tmp_path / "reconstruction.png").shape[:2] == (4 * side, 2 * side)
    assert {path.name for path in tmp_path.glob("*.png")} >= {"attention.png", "slots.png"}


def test_a_run_shows_the_same_pictures_in_tensorboard(
    monkeypatch: pytest.MonkeyPatch, motion_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_ranks(train_rank, 1, experiment(motion_data, run, "finetune"))
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {"attention", "kept_tokens", "slots"}
    video = next(motion_data.rglob("*.mp4"))
    assert run_main(monkeypatch, "visualize", str(run), str(video), "--out", str(tmp_path / "out")) == 0
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == {"attention", "kept_tokens", "slots"}
    assert open_video(tmp_path / "out" / "kept_tokens.mp4").num_frames == 4
