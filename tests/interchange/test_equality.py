"""Tests of loaded checkpoints: a model computes the same outputs as its original system, on real clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from everest_ds import load_model
from tests.interchange import systems
from tests.interchange.systems import CLIP, assert_same, assert_same_logits, clips, outputs, transformers


@pytest.fixture(scope="module")
def clip(motion_data: Path) -> Tensor:
    return clips(motion_data)


def test_a_classifier_of_the_originals(clip: Tensor, tmp_path: Path) -> None:
    model = systems.as_the_originals(systems.classifier())
    torch.save({"model": systems.finetuned_state(model)}, tmp_path / "a.pth")
    assert_same_logits(tmp_path / "a.pth", model, clip, *CLIP)


def test_a_classifier_of_mvd_in_its_positions(clip: Tensor, tmp_path: Path) -> None:
    model = systems.with_grid_positions(systems.as_the_originals(systems.classifier()))
    torch.save({"model": systems.finetuned_state(model)}, tmp_path / "a.pth")
    assert_same_logits(tmp_path / "a.pth", model, clip, *CLIP, "model.positions=grid")


def test_an_autoencoder_of_the_originals(clip: Tensor, tmp_path: Path) -> None:
    model = systems.as_the_originals(systems.autoencoder(decoder_num_hidden_layers=3))
    torch.save(systems.pretrained_state(model), tmp_path / "a.pth")
    ours = outputs(load_model(tmp_path / "a.pth", *CLIP), clip)
    assert_same(ours.prediction_BMP, systems.their_reconstruction(model, clip, ours.predicted_BM))


@pytest.mark.parametrize("backbone", ["vit_tiny", pytest.param("vit_small", marks=pytest.mark.slow)])
@pytest.mark.parametrize("eps", [1e-12, 1e-6])
def test_a_classifier_of_transformers(clip: Tensor, tmp_path: Path, backbone: str, eps: float) -> None:
    """The epsilon is read from config.json: released models have 1e-12, unlike the original code."""
    model = systems.classifier(backbone, layer_norm_eps=eps)
    model.save_pretrained(tmp_path)
    assert_same_logits(tmp_path, model, clip)


@pytest.mark.parametrize("backbone", ["vit_tiny", pytest.param("vit_small", marks=pytest.mark.slow)])
def test_an_autoencoder_of_transformers(clip: Tensor, tmp_path: Path, backbone: str) -> None:
    model = systems.autoencoder(backbone)
    model.save_pretrained(tmp_path)
    ours = outputs(load_model(tmp_path), clip)
    assert_same(ours.prediction_BMP, systems.their_reconstruction(model, clip, ours.predicted_BM))


def test_an_encoder_of_transformers(clip: Tensor, tmp_path: Path) -> None:
    model = systems.autoencoder()
    model.videomae.save_pretrained(tmp_path)
    assert_same(outputs(load_model(tmp_path), clip), systems.their_features(model, clip))


@pytest.mark.parametrize("system", ["mme", "mvd"])
def test_the_encoder_of_other_pretraining(clip: Tensor, tmp_path: Path, system: str) -> None:
    model = systems.autoencoder()
    state = systems.mme_state(model) if system == "mme" else systems.mvd_state(model)
    if system == "mvd":
        systems.with_grid_positions(model)
    torch.save({"model": state}, tmp_path / "a.pth")
    ours = load_model(tmp_path / "a.pth", *CLIP)
    assert_same(outputs(ours, clip), systems.their_features(model, clip))


def test_features_are_what_the_head_reads(clip: Tensor, tmp_path: Path) -> None:
    model = systems.classifier()
    model.save_pretrained(tmp_path)
    features = outputs(load_model(tmp_path, features=True), clip)
    assert_same(model.classifier(features).detach(), systems.their_logits(model, clip))


def test_kept_tokens_are_an_override_away(clip: Tensor, tmp_path: Path) -> None:
    """A dense classifier gives its own logits on all tokens, and other logits on fewer tokens."""
    model = systems.classifier()
    model.save_pretrained(tmp_path)
    expected = systems.their_logits(model, clip)
    assert_same(
        outputs(load_model(tmp_path, "tokens.selection=rero", "tokens.keep_ratio=1.0"), clip), expected
    )
    fewer = load_model(tmp_path, "tokens.selection=rero", "tokens.keep_ratio=0.5")
    assert fewer.config.token_counts.num_kept == 32
    assert (outputs(fewer, clip) - expected).abs().max() > 1e-4


@pytest.mark.parametrize("save", ["folder", "state dict", "sharded", "safetensors alone"])
def test_transformers_weights_as_they_come(clip: Tensor, tmp_path: Path, save: str) -> None:
    model = systems.classifier()
    path = tmp_path / "folder"
    if save == "state dict":  # two biases have other names in state dicts than in files
        path = tmp_path / "weights.bin"
        torch.save(model.state_dict(), path)
    else:
        model.save_pretrained(path, max_shard_size="1MB" if save == "sharded" else "1GB")
        assert (save == "sharded") == (path / "model.safetensors.index.json").is_file()
    if save == "safetensors alone":
        path = (path / "model.safetensors").rename(tmp_path / "a.safetensors")
    eps = [] if path.is_dir() else ["model.last_norm_eps=1e-5"]
    assert_same_logits(path, model, clip, *CLIP, *eps)


def test_an_export_loads_with_from_pretrained_and_says_the_same(clip: Tensor, tmp_path: Path) -> None:
    from everest_ds.interchange.convert import convert_weights

    for kind, model in {"finetune": systems.classifier(), "pretrain": systems.autoencoder()}.items():
        model.save_pretrained(tmp_path / kind)
        convert_weights(tmp_path / kind, tmp_path / f"{kind}.safetensors", "everest")
        convert_weights(tmp_path / f"{kind}.safetensors", tmp_path / f"{kind}-back", "transformers")
        again = type(model).from_pretrained(tmp_path / f"{kind}-back").eval()
        assert again.config.architectures == model.config.architectures
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        if kind == "finetune":
            assert torch.equal(systems.their_logits(again, clip), systems.their_logits(model, clip))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "pretrain-back")
    pixels = processor(list(clip[0].numpy()), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, systems.their_pixels(clip[:1]), rtol=0, atol=1e-5)


def test_an_export_of_our_own_model_differs_by_its_last_epsilon_at_most(clip: Tensor, tmp_path: Path) -> None:
    from everest_ds.interchange.convert import convert_weights

    torch.save(systems.finetuned_state(systems.classifier()), tmp_path / "a.pth")
    done = convert_weights(tmp_path / "a.pth", tmp_path / "out", "transformers", CLIP)
    theirs = transformers.VideoMAEForVideoClassification.from_pretrained(tmp_path / "out").eval()
    ours = outputs(load_model(tmp_path / "a.pth", *CLIP), clip)
    assert (ours - systems.their_logits(theirs, clip)).abs().max() < 5e-5 * ours.abs().max()
    assert any("epsilon 1e-05 in transformers and 1e-06" in note for note in done.notes)
    assert_same(ours, systems.their_logits(systems.as_the_originals(theirs), clip))


@pytest.mark.parametrize("system", ["originals", "transformers"])
def test_a_classifier_without_its_head_is_an_encoder(clip: Tensor, tmp_path: Path, system: str) -> None:
    model = systems.classifier()
    if system == "originals":
        state = systems.finetuned_state(model)
        kept = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        whole, headless = tmp_path / "whole.pth", tmp_path / "headless.pth"
        torch.save({"model": state}, whole)
        torch.save({"model": kept}, headless)
    else:
        whole, headless = tmp_path / "whole", tmp_path / "headless"
        model.save_pretrained(whole)
        model.save_pretrained(headless)
        file = headless / "model.safetensors"
        kept = {name: t for name, t in load_file(file).items() if not name.startswith("classifier.")}
        save_file(kept, file)
    encoder, classifier = load_model(headless, *CLIP), load_model(whole, *CLIP, features=True)
    assert torch.equal(outputs(encoder, clip), outputs(classifier, clip))
