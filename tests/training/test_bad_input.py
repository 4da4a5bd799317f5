"""Tests of errors in user input: every rank ends with one line that names the cause, without a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from everest_ds.checkpoints.tensor_file import save_weights
from everest_ds.config import dump_experiment
from everest_ds.errors import RunFolderError
from everest_ds.models import build_model
from everest_ds.training.run_folder import RunFolder
from tests.ranks import run_ranks
from tests.training.faults import outcome
from tests.training.runs import experiment, train_rank


def manifest_with(data: Path, folder: Path, line: str) -> Path:
    """Write a copy of the training manifest with one more line, and return its path."""
    text = "".join(f"{data / line}\n" for line in (data / "train.txt").read_text().splitlines())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "list.txt").write_text(text + line + "\n")
    return folder / "list.txt"


def broken_video(data: Path, target: Path, cut: int | None) -> Path:
    whole = (data / "train" / "00000.mp4").read_bytes()
    target.write_bytes(b"not a video at all" if cut is None else whole[:cut])
    return target


@pytest.mark.parametrize(
    "name, make",
    [
        ("missing.mp4", lambda data, path: None),
        ("empty.mp4", lambda data, path: path.write_bytes(b"")),
        ("text.mp4", lambda data, path: broken_video(data, path, None)),
        ("cut.mp4", lambda data, path: broken_video(data, path, 900)),
        ("folder.mp4", lambda data, path: path.mkdir()),
    ],
)
def test_a_broken_video_stops_every_rank_with_its_name(
    motion_data: Path, tmp_path: Path, name: str, make: Callable[[Path, Path], object]
) -> None:
    make(motion_data, tmp_path / name)
    manifest = manifest_with(motion_data, tmp_path, f"{tmp_path / name} 0")
    config = experiment(
        motion_data,
        tmp_path / "run",
        data={"train": str(manifest)},
        batch={"micro_batch_size": 1, "global_batch_size": 25},
        schedule={"epochs": 1, "warmup_epochs": 0},
    )
    (message,) = run_ranks(outcome, 1, config)
    assert message.startswith("DataError") and name in message
    assert "\n" not in message and "Traceback" not in message


def test_one_rank_that_cannot_read_stops_the_others_with_its_reason(
    motion_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.mp4").touch()
    manifest = manifest_with(motion_data, tmp_path, f"{tmp_path / 'empty.mp4'} 0")
    config = experiment(motion_data, tmp_path / "run", data={"train": str(manifest)})
    messages = run_ranks(outcome, 2, config)
    assert messages[0] == messages[1]
    assert "empty.mp4: the video file is empty" in messages[0]


def test_a_short_video_says_what_is_needed(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path, data={"frame_stride": 7})
    (message,) = run_ranks(outcome, 1, config)
    assert "too short for a clip; given: 20 frames; allowed: at least 22" in message
    assert ".mp4" in message


def test_a_data_set_smaller_than_a_batch_is_refused(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path, batch={"global_batch_size": 64})
    (message,) = run_ranks(outcome, 1, config)
    assert "fewer samples than one global batch; given: 24 samples, 64 clips" in message


def test_weights_of_another_architecture_name_the_parameter(motion_data: Path, tmp_path: Path) -> None:
    other = experiment(motion_data, tmp_path, model={"patch_size": 16})
    weights = {name: p.detach() for name, p in build_model(other).named_parameters()}
    save_weights(weights, tmp_path / "other.safetensors", {})
    config = experiment(
        motion_data, tmp_path / "run", "finetune", model={"init_from": str(tmp_path / "other.safetensors")}
    )
    (message,) = run_ranks(outcome, 1, config)
    assert "another architecture, at `encoder.embed.weight`" in message
    assert "given: shape (128, 1536); allowed: shape (128, 384)" in message


def test_a_pickle_that_would_run_something_is_not_opened(motion_data: Path, tmp_path: Path) -> None:
    torch.save({"model": {}, "hook": tmp_path}, tmp_path / "weights.pth")
    config = experiment(
        motion_data, tmp_path / "run", "finetune", model={"init_from": str(tmp_path / "weights.pth")}
    )
    (message,) = run_ranks(outcome, 1, config)
    assert "weights.pth: refused, because it holds objects other than weights; given: pathlib" in message


def test_a_folder_of_another_config_names_the_difference(motion_data: Path, tmp_path: Path) -> None:
    short = {"epochs": 1, "warmup_epochs": 0}
    run_ranks(train_rank, 1, experiment(motion_data, tmp_path, schedule=short))
    changed = experiment(motion_data, tmp_path, schedule=short, tokens={"mask_ratio": 0.8})
    (message,) = run_ranks(outcome, 1, changed)
    assert (
        "belongs to a run with another config; given: tokens.mask_ratio=0.8 (in the folder: 0.75)" in message
    )


def test_a_longer_schedule_names_the_way_on(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path)
    (tmp_path / "config.yaml").write_text(dump_experiment(config))
    (tmp_path / "best.safetensors").touch()
    longer = experiment(motion_data, tmp_path, schedule={"epochs": 30})
    with pytest.raises(RunFolderError, match="given: schedule.epochs=30 .in the folder: 3.") as caught:
        RunFolder(tmp_path).check_same_config(longer)
    assert f"run.dir=NEW model.init_from={tmp_path}" in str(caught.value)
    other = experiment(motion_data, tmp_path, schedule={"epochs": 30}, tokens={"mask_ratio": 0.6})
    with pytest.raises(RunFolderError, match="remove the folder to start over"):
        RunFolder(tmp_path).check_same_config(other)


def test_a_start_that_fails_leaves_the_folder_free(motion_data: Path, tmp_path: Path) -> None:
    short = {"epochs": 1, "warmup_epochs": 0}
    missing = {"init_from": str(tmp_path / "runs" / "pree")}
    wrong = experiment(motion_data, tmp_path / "run", "finetune", schedule=short, model=missing)
    (message,) = run_ranks(outcome, 1, wrong)
    assert "pree" in message
    right = experiment(motion_data, tmp_path / "run", "finetune", schedule=short)
    run_ranks(train_rank, 1, right)
    (message,) = run_ranks(outcome, 1, wrong)
    assert "belongs to a run with another config; given: model.init_from" in message


@pytest.mark.parametrize("name", ["config.yaml", "grace.json", "excluded.json", "environment.json"])
@pytest.mark.parametrize("text", ["", '{"needed'])
def test_a_state_file_that_an_old_version_left_half_written_is_survived_or_named(
    motion_data: Path, tmp_path: Path, name: str, text: str
) -> None:
    config = experiment(motion_data, tmp_path, schedule={"epochs": 1, "warmup_epochs": 0})
    run_ranks(train_rank, 1, config)
    (tmp_path / name).write_text(text)
    (message,) = run_ranks(outcome, 1, config)
    named = name in ("config.yaml", "excluded.json")
    assert (f"{name}" in message and "fix: restore" in message) if named else message == "done", message


def test_a_live_folder_is_refused(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path)
    live = RunFolder(tmp_path)
    live.open(config, {}, 1)
    (message,) = run_ranks(outcome, 1, config)
    live.close()
    assert "another run is active in this folder; given: process" in message


def test_a_diverging_loss_stops_the_run(motion_data: Path, tmp_path: Path) -> None:
    wild = {"epochs": 3, "warmup_epochs": 0, "base_lr": 1e12}
    (message,) = run_ranks(outcome, 1, experiment(motion_data, tmp_path, schedule=wild))
    assert message.startswith("DivergedError") and "schedule.base_lr" in message
