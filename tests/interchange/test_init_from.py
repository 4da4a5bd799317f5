"""Tests of `model.init_from`: fine-tuning starts from the encoder of any system."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds import load_model
from everest_ds.checkpoints.export import config_entry, export_weights
from everest_ds.checkpoints.tensor_file import save_weights
from everest_ds.config import Experiment
from everest_ds.data.synthetic import MOTIONS
from everest_ds.errors import CheckpointError
from everest_ds.interchange.convert import convert_weights
from everest_ds.models import build_model
from everest_ds.training.plan import check_plan
from everest_ds.training.weights import initial_weights
from tests.interchange import systems
from tests.interchange.systems import CLIP
from tests.ranks import run_ranks
from tests.training.runs import experiment, train_rank

MODEL = {"backbone": "vit_tiny", "num_frames": 8, "image_size": 64, "num_classes": 3}


def finetuning(**model: object) -> Experiment:
    return Experiment.model_validate({"task": "finetune", "model": {**MODEL, **model}})


def checkpoint_of(system: str, folder: Path) -> Path:
    model, file = systems.autoencoder(), folder / f"{system}.pth"
    if system == "transformers":
        model.save_pretrained(folder / system)
        return folder / system
    states = {"videomae": systems.pretrained_state, "mvd": systems.mvd_state, "mme": systems.mme_state}
    torch.save({"model": states[system](model)}, file)
    if system == "mvd":  # its position table has 64 tokens, but the default clip has 1568
        convert_weights(file, folder / "mvd.safetensors", "everest", CLIP)
        return folder / "mvd.safetensors"
    return file


@pytest.mark.parametrize("system", ["videomae", "mme", "mvd", "transformers"])
def test_the_encoder_is_the_checkpoints_and_the_rest_is_drawn(system: str, tmp_path: Path) -> None:
    path = checkpoint_of(system, tmp_path)
    config = finetuning(positions="grid" if system == "mvd" else "flat")
    theirs = load_model(path, *CLIP).encoder.state_dict()
    with initial_weights(config, path) as weights, initial_weights(config, None) as drawn:
        fresh = dict(drawn())
        for name, value in weights():
            expected = theirs.get(name.removeprefix("encoder.")) if "positions" not in name else None
            assert torch.equal(value, fresh[name] if expected is None else expected), name


@pytest.mark.parametrize(
    ("system", "positions", "fix"), [("mvd", "flat", "grid"), ("videomae", "grid", "flat")]
)
def test_other_positions_are_refused(system: str, positions: str, fix: str, tmp_path: Path) -> None:
    path = checkpoint_of(system, tmp_path)
    with pytest.raises(CheckpointError, match=f"fix: set model.positions={fix}"):
        with initial_weights(finetuning(positions=positions), path):
            pass


def encoder_file(folder: Path, **recorded: Any) -> Path:
    """Write a small classifier of clips of 8 x 64 x 64 pixels, changed by the given settings."""
    model = finetuning(**recorded)
    weights = {name: p.detach() for name, p in build_model(model).named_parameters()}
    metadata = config_entry(model.model_dump(mode="json"))
    save_weights(weights, folder / "encoder.safetensors", metadata)
    return folder / "encoder.safetensors"


OTHER_CLIPS = {
    "fewer pixels": ({"image_size": 32}, "model.image_size=64; fix", True),
    "more pixels": ({"image_size": 96}, "model.image_size=64; fix", True),
    "more frames": ({"num_frames": 16}, "model.num_frames=8; fix", True),
    "tubelets of as many values": (
        {"num_frames": 16, "tubelet_size": 8, "patch_size": 8},
        "model.tubelet_size=2",
        False,
    ),
    "another width": ({"backbone": "vit_small"}, "weights of another architecture", False),
    "other positions": ({"positions": "grid"}, "fix: set model.positions=flat$", False),
    "interpolated from others": (
        {"positions_from": {"num_frames": 4, "image_size": 64}},
        "allowed: model.positions_from=null",
        False,
    ),
}


@pytest.mark.parametrize(("settings", "says", "may"), OTHER_CLIPS.values(), ids=list(OTHER_CLIPS))
def test_an_encoder_of_other_clips_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], says: str, may: bool
) -> None:
    file = encoder_file(tmp_path)
    with pytest.raises(CheckpointError, match=says) as refused, initial_weights(finetuning(**settings), file):
        pass
    interpolated = "model.positions_from.num_frames=8 model.positions_from.image_size=64 to interpolate"
    assert (interpolated in str(refused.value)) is may


@pytest.mark.parametrize(
    "settings",
    [
        {"num_frames": 4},  # the positions of slots do not depend on later slots
        {"num_frames": 16, "image_size": 96, "positions_from": {"num_frames": 8, "image_size": 64}},
    ],
)
def test_an_encoder_of_other_clips_is_taken_where_it_finds_its_positions(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    file = encoder_file(tmp_path)
    config = finetuning(**settings)
    learned = dict(load_model(file, features=True).named_parameters())
    with initial_weights(config, file) as weights:
        for name, value in weights():
            assert name not in learned or not name.startswith("encoder") or torch.equal(value, learned[name])


def test_the_encoder_of_interpolated_positions_starts_a_run_with_the_same_only(tmp_path: Path) -> None:
    interpolated = {"image_size": 96, "positions_from": {"num_frames": 8, "image_size": 64}}
    file = encoder_file(tmp_path, **interpolated)
    with initial_weights(finetuning(**interpolated), file):
        pass
    with pytest.raises(CheckpointError, match=r"fix: set model\.\S+ model\.\S+$"):
        with initial_weights(finetuning(image_size=96), file):
            pass
    # Unlike in a table that is not interpolated, a slot of a shorter clip has other positions.
    with pytest.raises(CheckpointError, match=r"fix: set model\.num_frames=8$"):
        with initial_weights(finetuning(num_frames=4, **interpolated), file):
            pass
    for system in ("videomae", "transformers"):
        with pytest.raises(CheckpointError, match=f"{system} cannot compute the interpolated positions"):
            convert_weights(file, tmp_path / "out", system)
    assert load_model(file).config.model.positions_from.image_size == 64


def test_a_dry_run_refuses_an_encoder_of_other_clips(tmp_path: Path) -> None:
    file = encoder_file(tmp_path)
    config = finetuning(init_from=file, image_size=96)
    with pytest.raises(CheckpointError, match="model.positions_from.num_frames=8"):
        check_plan(config, 1, planned=True)
    later = finetuning(init_from=tmp_path / "later.safetensors", image_size=96)
    assert check_plan(later, 1, planned=True)["model"]


def test_weights_can_be_declared_to_be_of_another_clip_shape(tmp_path: Path) -> None:
    declared = tmp_path / "declared.safetensors"
    convert_weights(encoder_file(tmp_path), declared, "everest", ["model.num_frames=16"])
    with initial_weights(finetuning(num_frames=16), declared):
        pass


def test_a_file_that_does_not_record_its_clips_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = checkpoint_of("videomae", tmp_path)
    with initial_weights(finetuning(), file):
        assert "videomae.pth does not record its clip shape" in caplog.text


def test_a_run_from_a_dense_checkpoint_becomes_a_model_of_transformers(
    motion_data: Path, tmp_path: Path
) -> None:
    """A dense checkpoint is fine-tuned on kept tokens, as in the paper, and exported to transformers."""
    config = experiment(
        motion_data,
        tmp_path / "run",
        "finetune",
        model={
            **MODEL,
            "patch_size": 16,
            "num_classes": 6,
            "init_from": str(checkpoint_of("videomae", tmp_path)),
        },
        schedule={"epochs": 1, "warmup_epochs": 0},
    )
    run_ranks(train_rank, 1, config)
    log = (tmp_path / "run" / "logs" / "rank-0.log").read_text()
    assert f"encoder weights from {tmp_path / 'videomae.pth'}" in log
    ours = load_model(tmp_path / "run", "tokens.selection=none")
    clip = systems.clips(motion_data)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    export_weights(checkpoint, tmp_path / "exported.safetensors", "fp32")
    for same in (checkpoint, tmp_path / "exported.safetensors"):
        again = load_model(same, "tokens.selection=none")
        assert again.config.model.num_frames == 8 and again.config.data.frame_stride == 2
        assert torch.equal(systems.outputs(again, clip), systems.outputs(ours, clip))
    done = convert_weights(tmp_path / "run", tmp_path / "hub", "transformers")
    assert load_model(tmp_path / "hub").class_names == ours.class_names == list(MOTIONS)
    assert any("this model keeps 0.5 of the tokens (rero)" in note for note in done.notes)
    theirs = systems.transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "hub").eval()
    systems.assert_same(
        systems.outputs(ours, clip), systems.their_logits(systems.as_the_originals(theirs), clip)
    )
