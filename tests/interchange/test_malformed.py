"""Tests of weights whose descriptions hold anything: whatever a file says, the error is a CheckpointError."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from everest_ds.config import Experiment
from everest_ds.errors import CheckpointError, ExitCode
from everest_ds.interchange.encoder_weights import open_encoder
from everest_ds.interchange.source import open_source
from tests.interchange import systems

ODD: list[Any] = [None, True, -1, 0, 1.5, 10**30, "", "x", [], [1], {}, {"a": 1}]
RUN = Experiment.model_validate({"task": "finetune", "model": {"num_classes": 3}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformers")
    systems.classifier(id2label={0: "a", 1: "b", 2: "c"}).save_pretrained(path)
    return path


def refusals(path: Path, write: Callable[[Any], object]) -> int:
    """Read `path` after each `write` of an odd value, and return how often it was refused."""
    count = 0
    for value in ODD:
        write(value)
        for read in (lambda: open_source(path), lambda: open_encoder(path, RUN)):
            try:
                with read():
                    pass
            except CheckpointError as error:
                assert error.exit_code == ExitCode.CHECKPOINT and "\n" not in str(error)
                count += 1
    return count


def write_entry(file: Path, told: dict[str, Any], key: str, value: Any) -> None:
    file.write_text(json.dumps({**told, key: value}))


def test_a_config_of_transformers_that_holds_anything_is_refused_by_name(folder: Path) -> None:
    file = folder / "config.json"
    told = json.loads(file.read_text())
    keys = ["image_size", "num_frames", "tubelet_size", "hidden_size", "num_hidden_layers", "id2label"]
    keys += ["layer_norm_eps", "norm_pix_loss", "model_type", "qv_bias"]
    try:
        for key in keys:
            refused = refusals(folder, partial(write_entry, file, told, key))
            assert refused or key in ("norm_pix_loss", "qv_bias"), key
        assert refusals(folder, lambda value: file.write_text(json.dumps(value)))
    finally:
        file.write_text(json.dumps(told))


def test_preprocessing_that_holds_anything_is_refused_by_name(folder: Path) -> None:
    file = folder / "preprocessor_config.json"
    try:
        assert refusals(folder, lambda value: file.write_text(json.dumps({"image_mean": value}))) > 10
    finally:
        file.unlink()


def test_an_index_that_holds_anything_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors.index.json"
    try:
        everything = 2 * len(ODD)
        assert refusals(folder, lambda value: file.write_text(json.dumps(value))) == everything
        assert (
            refusals(folder, lambda value: file.write_text(json.dumps({"weight_map": value}))) == everything
        )
        assert (
            refusals(folder, lambda value: file.write_text(json.dumps({"weight_map": {"a": value}})))
            == everything
        )
    finally:
        file.unlink()


def test_metadata_that_holds_anything_is_refused(folder: Path, tmp_path: Path) -> None:
    names = {"classifier": "head", "fc_norm": "norm"}
    tensors = {
        names.get(name.partition(".")[0], name): t
        for name, t in load_file(folder / "model.safetensors").items()
    }
    own = {"head.weight": torch.zeros(3, 192), "encoder.embed.weight": torch.zeros(192, 1536), **tensors}
    file = tmp_path / "own.safetensors"
    for key in ("config", "classes"):
        for text in ("", "{", "[]", "null", "3", '{"model": 3}', '{"model": {"num_frames": []}}'):
            save_file(own, file, {key: text})
            with pytest.raises(CheckpointError) as error, open_source(file):
                pass
            assert error.value.exit_code == ExitCode.CHECKPOINT


@pytest.mark.parametrize(
    "key", ["num_frames", "mcm", "mcm_ratio", "mask_type", "mask_ratio", "sampling_rate"]
)
def test_arguments_of_a_script_that_hold_anything_are_refused(folder: Path, tmp_path: Path, key: str) -> None:
    state = systems.finetuned_state(systems.classifier())
    usual: dict[str, Any] = {
        "num_frames": 8,
        "input_size": 64,
        "mcm": True,
        "mcm_ratio": 0.3,
        "sampling_rate": 4,
    }
    if key.startswith("mask"):
        usual |= {
            "mcm": False,
            "mask_type": "motion-centric",
            "motion_centric_masking_ratio": 0.3,
            "mask_ratio": 0.9,
        }

    def write(value: Any) -> None:
        torch.save({"model": state, "args": argparse.Namespace(**{**usual, key: value})}, tmp_path / "a.pth")

    assert refusals(tmp_path / "a.pth", write) or key == "mask_type"
