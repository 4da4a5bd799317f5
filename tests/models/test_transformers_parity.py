"""Tests against transformers' VideoMAE: outputs, losses and gradients with the same weights.

This independent implementation checks all parts except token selection: embedding, positions, blocks, order
of decoder tokens, targets and loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.models import Classifier, PretrainModel
from everest_ds.models.tubelets import PIXEL_MEAN, PIXEL_STD
from tests.models import experiment, random_clips

transformers = pytest.importorskip("transformers", minversion="5.0")

Pick = Callable[[nn.Parameter], Tensor]
KEYS = torch.tensor([11, 22])


def their_config(config: Experiment) -> Any:
    encoder, decoder = config.model.shape.encoder, config.model.shape.decoder
    return transformers.VideoMAEConfig(
        image_size=config.model.image_size,
        num_frames=config.model.num_frames,
        hidden_size=encoder.width,
        num_hidden_layers=encoder.depth,
        num_attention_heads=encoder.heads,
        intermediate_size=4 * encoder.width,
        decoder_hidden_size=decoder.width,
        decoder_num_hidden_layers=decoder.depth,
        decoder_num_attention_heads=decoder.heads,
        decoder_intermediate_size=4 * decoder.width,
        layer_norm_eps=1e-6,
        use_mean_pooling=config.task == "finetune",
        num_labels=config.model.num_classes or 0,
    )


def randomize(model: nn.Module) -> None:
    """Perturb all parameters, because a swap of two biases at 0 or two gains at 1 would go unnoticed."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def norm_and_linear(name: str, module: nn.Module, pick: Pick) -> dict[str, Tensor]:
    return {f"{name}.{part}": pick(parameter) for part, parameter in module.named_parameters()}


def from_layers(prefix: str, layers: Iterable[Any], pick: Pick) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for i, layer in enumerate(layers):
        name, attention = f"{prefix}.{i}", layer.attention.attention
        qkv = (attention.query.weight, attention.key.weight, attention.value.weight)
        ours[f"{name}.attention.qkv.weight"] = torch.cat([pick(weight) for weight in qkv])
        ours[f"{name}.attention.q_bias"] = pick(attention.query.bias)
        ours[f"{name}.attention.v_bias"] = pick(attention.value.bias)
        ours |= norm_and_linear(f"{name}.attention.proj", layer.attention.output.dense, pick)
        ours |= norm_and_linear(f"{name}.norm1", layer.layernorm_before, pick)
        ours |= norm_and_linear(f"{name}.norm2", layer.layernorm_after, pick)
        ours |= norm_and_linear(f"{name}.mlp.fc1", layer.intermediate.dense, pick)
        ours |= norm_and_linear(f"{name}.mlp.fc2", layer.output.dense, pick)
    return ours


def from_encoder(videomae: Any, pick: Pick) -> dict[str, Tensor]:
    projection = videomae.embeddings.patch_embeddings.projection
    weight = pick(projection.weight).permute(0, 2, 3, 4, 1).flatten(1)  # colour last, as in a tubelet
    ours = {"encoder.embed.weight": weight, "encoder.embed.bias": pick(projection.bias)}
    return ours | from_layers("encoder.blocks", videomae.encoder.layer, pick)


def from_pretraining(theirs: Any, pick: Pick) -> dict[str, Tensor]:
    ours = from_encoder(theirs.videomae, pick) | {"mask_token": pick(theirs.mask_token).flatten()}
    ours |= norm_and_linear("norm", theirs.videomae.layernorm, pick)
    ours |= norm_and_linear("to_decoder", theirs.encoder_to_decoder, pick)
    ours |= from_layers("decoder", theirs.decoder.decoder_layers, pick)
    ours |= norm_and_linear("decoder_norm", theirs.decoder.norm, pick)
    return ours | norm_and_linear("head", theirs.decoder.head, pick)


def from_classifier(theirs: Any, pick: Pick) -> dict[str, Tensor]:
    ours = from_encoder(theirs.videomae, pick) | norm_and_linear("norm", theirs.fc_norm, pick)
    return ours | norm_and_linear("head", theirs.classifier, pick)


def their_pixels(clip_BFHWC: Tensor) -> Tensor:
    pixels = (clip_BFHWC / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    return pixels.permute(0, 1, 4, 2, 3)


def data_of(parameter: nn.Parameter) -> Tensor:
    return parameter.detach()


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def assert_same_gradients(ours: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, parameter in ours.named_parameters():
        largest = expected[name].abs().max().item()
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5 * max(largest, 1e-3))


def pretraining_pair(config: Experiment) -> tuple[PretrainModel, Any]:
    theirs = transformers.VideoMAEForPreTraining(their_config(config))
    theirs.decoder.norm.eps = 1e-6  # 1e-5 in transformers, 1e-6 in VideoMAE
    randomize(theirs)
    ours = PretrainModel(config)
    ours.load_state_dict(from_pretraining(theirs, data_of))
    return ours, theirs


def classifier_pair(config: Experiment) -> tuple[Classifier, Any]:
    theirs = transformers.VideoMAEForVideoClassification(their_config(config))
    theirs.fc_norm.eps = 1e-6  # 1e-5 in transformers, 1e-6 in VideoMAE
    randomize(theirs)
    ours = Classifier(config)
    ours.load_state_dict(from_classifier(theirs, data_of))
    return ours, theirs


def hidden_from_encoder(ours: PretrainModel, clip: Tensor, keys: Tensor) -> Tensor:
    """Return the mask of predicted tokens in transformers' convention: True if hidden, bool (B, N)."""
    predicted = ours.selector(clip, ours.encoder.embed(), keys).predicted_BM
    hidden = torch.zeros(len(clip), ours.selector.counts.num_tokens, dtype=torch.bool)
    return hidden.scatter(1, predicted, True)


def test_pretraining_predictions_loss_and_gradients() -> None:
    config = experiment("pretrain", "tube")
    ours, theirs = pretraining_pair(config)
    clip = random_clips(config, 2)
    expected = theirs(their_pixels(clip), hidden_from_encoder(ours, clip, KEYS))
    output = ours(clip, KEYS)
    torch.testing.assert_close(output.prediction_BMP, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)
    output.loss.backward()
    expected.loss.backward()
    assert_same_gradients(ours, from_pretraining(theirs, gradient_of))


def test_classifier_logits_and_gradients() -> None:
    config = experiment("finetune", "none")
    ours, theirs = classifier_pair(config)
    clip, labels = random_clips(config, 2), torch.tensor([6, 1])
    logits, expected = ours(clip, KEYS), theirs(their_pixels(clip)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    nn.functional.cross_entropy(logits, labels).backward()
    nn.functional.cross_entropy(expected, labels).backward()
    assert_same_gradients(ours, from_classifier(theirs, gradient_of))


@pytest.mark.slow
def test_pretraining_of_vit_small_at_full_size() -> None:
    config = experiment("pretrain", "tube", backbone="vit_small", num_frames=16, image_size=224)
    ours, theirs = pretraining_pair(config)
    clip, keys = random_clips(config, 1), KEYS[:1]
    with torch.no_grad():
        expected = theirs(their_pixels(clip), hidden_from_encoder(ours, clip, keys))
        output = ours(clip, keys)
    torch.testing.assert_close(output.prediction_BMP, expected.logits, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_classifier_of_vit_small_at_full_size() -> None:
    config = experiment("finetune", "none", backbone="vit_small", num_frames=16, image_size=224)
    ours, theirs = classifier_pair(config)
    clip = random_clips(config, 1)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(clip, KEYS[:1]), theirs(their_pixels(clip)).logits, rtol=1e-5, atol=1e-5
        )
