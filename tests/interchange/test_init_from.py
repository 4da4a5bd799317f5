"""Tests of `model.init_from`: fine-tuning starts from the encoder of any system."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from everest_ds import load_model
from everest_ds.checkpoints.export import export_weights
from everest_ds.config import Experiment
from everest_ds.data.synthetic import MOTIONS
from everest_ds.errors import CheckpointError
from everest_ds.interchange.convert import convert_weights
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
