"""Tests of TimeSformer: logits and gradients equal those of transformers' implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everest_ds.efficiency.peers.layers import VideoClassifier
from everest_ds.models.tubelets import PIXEL_MEAN, PIXEL_STD
from tests.efficiency.peers.small_peers import FRAMES, NUM_CLASSES, SHAPE, noise, randomized, small

transformers = pytest.importorskip("transformers", minversion="5.0")

KEYS = torch.tensor([5, 6])
# Name of transformers' module in a layer -> name of our module in a block.
BLOCK = {
    "temporal_layernorm": "time_norm",
    "temporal_attention.attention.qkv": "time_attention.qkv",
    "temporal_attention.output.dense": "time_attention.proj",
    "temporal_dense": "time_out",
    "layernorm_before": "space_norm",
    "attention.attention.qkv": "space_attention.qkv",
    "attention.output.dense": "space_attention.proj",
    "layernorm_after": "mlp_norm",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def theirs_with_weights_of(ours: VideoClassifier) -> Any:
    config = transformers.TimesformerConfig(
        image_size=FRAMES.image_size,
        patch_size=FRAMES.patch_size,
        num_frames=FRAMES.num_frames,
        hidden_size=SHAPE.width,
        num_hidden_layers=SHAPE.depth,
        num_attention_heads=SHAPE.heads,
        intermediate_size=4 * SHAPE.width,
        num_labels=NUM_CLASSES,
    )
    theirs = transformers.TimesformerForVideoClassification(config).eval()
    missing, unexpected = theirs.load_state_dict(translated(ours.state_dict()), strict=False)
    assert not missing and not unexpected
    return theirs


def translated(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename our weights to those of transformers' implementation."""
    weights = {}
    for part in ("weight", "bias"):
        weights[f"timesformer.layernorm.{part}"] = ours[f"body.norm.{part}"]
        weights[f"classifier.{part}"] = ours[f"body.head.{part}"]
        for i in range(SHAPE.depth):
            for their_name, name in BLOCK.items():
                weights[f"timesformer.encoder.layer.{i}.{their_name}.{part}"] = ours[
                    f"body.blocks.{i}.{name}.{part}"
                ]
    embeddings, p = "timesformer.embeddings.", FRAMES.patch_size
    weights[f"{embeddings}cls_token"] = ours["embedding.class_token"][None, None]
    weights[f"{embeddings}position_embeddings"] = ours["embedding.places"][None]
    weights[f"{embeddings}time_embeddings"] = ours["embedding.times"][None]
    projection = f"{embeddings}patch_embeddings.projection"
    weights[f"{projection}.weight"] = (
        ours["embedding.embed.weight"].unflatten(1, (p, p, 3)).permute(0, 3, 1, 2)
    )
    weights[f"{projection}.bias"] = ours["embedding.embed.bias"]
    return weights


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def normalized(clip_BFHWC: Tensor) -> Tensor:
    pixels = (clip_BFHWC / 255 - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)
    return pixels.permute(0, 1, 4, 2, 3)


def test_same_logits_and_gradients() -> None:
    ours = randomized(small("timesformer"))
    theirs = theirs_with_weights_of(ours)
    clips = noise(ours)
    logits, expected = ours(clips, KEYS), theirs(normalized(clips)).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    for loss in (logits, expected):
        nn.functional.cross_entropy(loss, torch.tensor([1, 3])).backward()
    gradients = gradients_of(theirs)
    for name, gradient in translated(gradients_of(ours)).items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-4, rtol=1e-3, msg=name)


def test_begins_as_an_image_model_but_for_its_first_block() -> None:
    model = small("timesformer").eval()
    nn.init.zeros_(model.get_parameter("body.blocks.0.time_out.weight"))
    nn.init.zeros_(model.get_parameter("embedding.times"))
    clips = noise(model)
    torch.testing.assert_close(model(clips.flip(1), KEYS), model(clips, KEYS))
