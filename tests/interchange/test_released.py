"""Tests with the released code of other systems: equal outputs, and checkpoints that load in both directions.

The tests need clones, whose paths are in EVEREST_CODE, VIDEOMAE_CODE, MVD_CODE and MME_CODE. All models are
ViT-S at full size.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import REPOSITORIES, load_peer, their_modules, to_video
from torch import Tensor, nn

from everest_ds import load_model
from everest_ds.interchange.convert import convert_weights
from tests.interchange.systems import assert_same
from tests.models.test_released_parity import KEY, clip_for, full_size, hidden, randomize

pytestmark = pytest.mark.slow

URLS = {
    **REPOSITORIES,
    "mvd": "https://github.com/ruiwang2021/mvd",
    "mme": "https://github.com/XinyuSun/MME",
}
MODULES = {
    "mvd": ("modeling_student", "modeling_finetune"),
    "mme": ("pretrain.model", "finetune.model", "pretrain", "finetune"),
}
MAKERS: dict[tuple[str, str], tuple[str, str, dict[str, Any]]] = {
    ("mvd", "pretrain"): ("modeling_student", "pretrain_masked_video_student_small_patch16_224", {}),
    ("mvd", "finetune"): ("modeling_finetune", "vit_small_patch16_224", {"num_classes": 7}),
    ("mme", "pretrain"): (
        "pretrain.model",
        "pretrain_mae_small_patch16_224",
        {"decoder_num_classes": [108, 48], "decoder_act": [nn.Sigmoid, nn.Tanh], "decoder_depth": 1},
    ),
    ("mme", "finetune"): ("finetune.model", "vit_small_patch16_224", {"num_classes": 7}),
}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], nn.Module]:
    """Return a builder of a system's own model, with randomised weights."""

    def build(system: str, task: str) -> nn.Module:
        variable = f"{system.upper()}_CODE"
        if variable not in os.environ:
            pytest.skip(f"git clone {URLS[system]} and set {variable} to that folder")
        folder = Path(os.environ[variable])
        if system in REPOSITORIES:
            model = load_peer(system, folder, config_of(system, task)).model
        else:
            monkeypatch.setattr(np, "float", float, raising=False)  # removed in NumPy 1.24
            module, name, arguments = MAKERS[system, task]
            with their_modules(folder, URLS[system], MODULES[system]) as load:
                model = getattr(load(module), name)(**arguments)
        fixed = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
        randomize(model)
        model.load_state_dict(fixed, strict=False)
        return model.eval()

    return build


def config_of(system: str, task: str) -> Any:
    sparse = {"everest": "rero", "videomae": "tube" if task == "pretrain" else "none"}
    return full_size(task, sparse[system], "vit_small")


def save(model: nn.Module, file: Path, **arguments: Any) -> None:
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**arguments)}, file)


ARGUMENTS: dict[tuple[str, str], dict[str, Any]] = {
    ("everest", "finetune"): {"mcm": True, "mcm_ratio": 0.4},
    ("everest", "pretrain"): {
        "mask_type": "motion-centric",
        "mask_ratio": 0.9,
        "motion_centric_masking_ratio": 0.7,
    },
    ("videomae", "pretrain"): {"mask_type": "tube", "mask_ratio": 0.9},
    ("mvd", "finetune"): {"use_cls_token": False},
}


@pytest.fixture(scope="module")
def clip() -> Tensor:
    return clip_for(full_size("finetune", "none", "vit_small"))


@pytest.mark.parametrize("system", URLS)
def test_logits(
    make: Any, clip: Tensor, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make(system, "finetune")
    save(theirs, tmp_path / "a.pth", **ARGUMENTS.get((system, "finetune"), {}))
    ours = load_model(tmp_path / "a.pth")
    with torch.no_grad():
        if system == "everest":  # near ties may be broken differently, so both keep the same tokens
            kept = ours.selector.kept(clip, ours.encoder.embed(), KEY).keep_BK
            monkeypatch.setattr(theirs, "mcm_step", lambda *_: hidden(kept))
        assert_same(ours(clip, KEY), theirs(to_video(clip)))


@pytest.mark.parametrize("system", REPOSITORIES)
def test_reconstructions(
    make: Any, clip: Tensor, system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = make(system, "pretrain")
    save(theirs, tmp_path / "a.pth", **ARGUMENTS[system, "pretrain"])
    with torch.no_grad():
        ours = load_model(tmp_path / "a.pth")(clip, KEY)
        masks = hidden(ours.visible_BV), hidden(ours.predicted_BM)
        if system == "everest":
            monkeypatch.setattr(theirs.encoder, "mcm_step", lambda *_: masks)
        output = theirs(to_video(clip), masks[0])
    assert_same(ours.prediction_BMP, output[0] if system == "everest" else output)


@pytest.mark.parametrize("system", MODULES)
def test_encoders(make: Any, clip: Tensor, system: str, tmp_path: Path) -> None:
    theirs = make(system, "pretrain")
    save(theirs, tmp_path / "a.pth")
    nothing_hidden = torch.zeros(1, 1568, dtype=torch.bool)
    encode = theirs.forward_encoder if system == "mvd" else theirs.encoder
    with torch.no_grad():
        expected = encode(to_video(clip), nothing_hidden).mean(dim=1)
        assert_same(load_model(tmp_path / "a.pth")(clip, KEY), expected)


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize("system", URLS)
def test_what_is_written_for_them_loads_there(make: Any, system: str, task: str, tmp_path: Path) -> None:
    """A written checkpoint loads in the original code: all weights, or only the encoder for MVD and MME."""
    theirs, again = make(system, task), make(system, task)
    save(theirs, tmp_path / "a.pth", **ARGUMENTS.get((system, task), {}))
    done = convert_weights(tmp_path / "a.pth", tmp_path / "a.safetensors", "everest")
    to = "videomae" if system == "everest" else system
    convert_weights(tmp_path / "a.safetensors", tmp_path / "back.pth", to)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    state = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    missing, unexpected = again.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) == {key.source for key in done.keys if key.status == "unused"}
    whole = dict(theirs.named_parameters())
    assert all(torch.equal(p, whole[name]) for name, p in again.named_parameters() if name in state)
