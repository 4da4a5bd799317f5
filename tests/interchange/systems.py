"""Small models of transformers, and their weights under the names of the original systems.

transformers is the independent implementation: a converted model must compute the same outputs.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everest_ds import load_model, read_clip
from everest_ds.config.tokens import ClipGeometry
from tests.models.test_transformers_parity import randomize, their_pixels

transformers = pytest.importorskip("transformers", minversion="5.0")

GEOMETRY = ClipGeometry(num_frames=8, image_size=64)
CLIP = ["model.num_frames=8", "model.image_size=64", "data.frame_stride=2"]
CLASSES = 6
EPS = 1e-6
SIZES = {"vit_tiny": (128, 4, 4, 64, 2, 2), "vit_small": (384, 12, 6, 192, 4, 3)}
State = dict[str, Tensor]


def their_config(backbone: str = "vit_tiny", **settings: Any) -> Any:
    width, depth, heads, decoder_width, decoder_depth, decoder_heads = SIZES[backbone]
    return transformers.VideoMAEConfig(
        **{
            "image_size": GEOMETRY.image_size,
            "num_frames": GEOMETRY.num_frames,
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
            "decoder_hidden_size": decoder_width,
            "decoder_num_hidden_layers": decoder_depth,
            "decoder_num_attention_heads": decoder_heads,
            "decoder_intermediate_size": 4 * decoder_width,
            "layer_norm_eps": EPS,
            "num_labels": CLASSES,
            **settings,
        }
    )


def classifier(backbone: str = "vit_tiny", **settings: Any) -> Any:
    return made(transformers.VideoMAEForVideoClassification(their_config(backbone, **settings)))


def autoencoder(backbone: str = "vit_tiny", **settings: Any) -> Any:
    config = their_config(backbone, use_mean_pooling=False, **settings)
    return made(transformers.VideoMAEForPreTraining(config))


def made(model: nn.Module) -> Any:
    randomize(model)
    return model.eval()


def as_the_originals(model: Any) -> Any:
    """Set the original epsilon in the two LayerNorms for which transformers uses PyTorch's default."""
    for name, module in model.named_modules():
        if name in ("fc_norm", "decoder.norm"):
            module.eps = EPS
    return model


def blocks(prefix: str, layers: Iterable[Any]) -> State:
    """Return the weights of a stack of blocks under the names of VideoMAE's modeling_finetune.py."""
    state: State = {}
    for number, layer in enumerate(layers):
        attention = layer.attention.attention
        qkv = (attention.query.weight, attention.key.weight, attention.value.weight)
        parts = {
            "attn.q_bias": attention.query.bias,
            "attn.v_bias": attention.value.bias,
            "attn.qkv.weight": torch.cat(qkv),
            "attn.proj": layer.attention.output.dense,
            "norm1": layer.layernorm_before,
            "norm2": layer.layernorm_after,
            "mlp.fc1": layer.intermediate.dense,
            "mlp.fc2": layer.output.dense,
        }
        for name, part in parts.items():
            state |= named(f"{prefix}.{number}.{name}", part)
    return state


def named(name: str, part: Any) -> State:
    if isinstance(part, nn.Module):
        return {f"{name}.{leaf}": tensor.detach() for leaf, tensor in part.named_parameters()}
    return {name: part.detach()}


def encoder_state(videomae: Any, prefix: str = "") -> State:
    projection = videomae.embeddings.patch_embeddings.projection
    return named(f"{prefix}patch_embed.proj", projection) | blocks(f"{prefix}blocks", videomae.encoder.layer)


def finetuned_state(model: Any) -> State:
    """Return the weights of a classifier under the names of VideoMAE, EVEREST, MVD and MME."""
    state = encoder_state(model.videomae) | named("fc_norm", model.fc_norm)
    return state | named("head", model.classifier)


def pretrained_state(model: Any) -> State:
    """Return the weights of a masked autoencoder under the names of VideoMAE and EVEREST."""
    state = encoder_state(model.videomae, "encoder.") | named("encoder.norm", model.videomae.layernorm)
    state |= named("encoder_to_decoder", model.encoder_to_decoder) | {"mask_token": model.mask_token.detach()}
    state |= blocks("decoder.blocks", model.decoder.decoder_layers)
    return state | named("decoder.norm", model.decoder.norm) | named("decoder.head", model.decoder.head)


def mme_state(model: Any) -> State:
    """Return the weights of MME's pre-training: decoders whose heads predict histograms and trajectories."""
    state = encoder_state(model.videomae, "encoder.") | named("encoder.norm", model.videomae.layernorm)
    state |= {"mask_token": torch.zeros(1, 1, 64), "encoder_to_decoder.0.weight": torch.zeros(64, 128)}
    state |= blocks("decoder.0.blocks", model.decoder.decoder_layers) | named(
        "decoder.0.norm", model.decoder.norm
    )
    heads = {f"decoder.0.head.{head}.{layer}" for head in (0, 1) for layer in (0, 2)}
    return state | {f"{head}.{leaf}": torch.zeros(1) for head in heads for leaf in ("weight", "bias")}


def mvd_state(model: Any) -> State:
    """Return the weights of MVD's student: names without prefix, grid positions, two decoders of features."""
    state = encoder_state(model.videomae) | named("norm", model.videomae.layernorm)
    state["pos_embed"] = grid_positions(model.config.hidden_size)
    for teacher in ("img", "vid"):
        state |= {
            f"mask_token_{teacher}": torch.zeros(1, 1, 64),
            f"pos_embed_{teacher}": torch.zeros(1, 64, 64),
        }
        state |= named(f"down_{teacher}", model.encoder_to_decoder)
        state |= blocks(f"decoder_{teacher}.blocks", model.decoder.decoder_layers)
        state |= named(f"decoder_{teacher}.norm", model.decoder.norm)
        state |= named(f"decoder_{teacher}.head", model.decoder.head)
    return state


def grid_positions(width: int) -> Tensor:
    """Compute MVD's position table (1, N, D): a quarter of D for the slot, the rest for column and row."""
    slots, side = GEOMETRY.num_slots, GEOMETRY.grid_size
    places = [(t, x, y) for t in range(slots) for y in range(side) for x in range(side)]
    share = {0: width // 4, 1: width * 3 // 8, 2: width * 3 // 8}
    rows = [torch.cat([waves(place[axis], share[axis]) for axis in (0, 1, 2)]) for place in places]
    return torch.stack(rows)[None].float()


def waves(position: int, width: int) -> Tensor:
    angle = position / 10000 ** (torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    return torch.cat([angle.sin(), angle.cos()])


def with_grid_positions(model: Any) -> Any:
    """Replace the positions of a model by those of MVD, and return the model."""
    model.videomae.embeddings.position_embeddings = grid_positions(model.config.hidden_size)
    return model


def clips(videos: Path, count: int = 2) -> Tensor:
    """Read clips of real H.264 files: uint8 (count, 8, 64, 64, 3)."""
    config = load_config()
    return torch.cat([read_clip(videos / f"test/{i:05d}.mp4", config).clip for i in range(count)])


def load_config() -> Any:
    from everest_ds.config import Experiment

    tree = {"model": {"num_frames": 8, "image_size": 64}, "data": {"frame_stride": 2}}
    return Experiment.model_validate({"task": "pretrain", **tree})


KEYS = torch.tensor([11, 22])
outputs = partial(torch.no_grad()(lambda model, clip: model(clip, KEYS[: len(clip)])))


@torch.no_grad()
def their_logits(model: Any, clip: Tensor) -> Tensor:
    return model(their_pixels(clip)).logits


@torch.no_grad()
def their_features(model: Any, clip: Tensor) -> Tensor:
    """Return the mean over tokens of the normalised encoder output."""
    return model.videomae(their_pixels(clip)).last_hidden_state.mean(dim=1)


@torch.no_grad()
def their_reconstruction(model: Any, clip: Tensor, predicted_BM: Tensor) -> Tensor:
    hidden = torch.zeros(len(clip), GEOMETRY.num_tokens, dtype=torch.bool).scatter(1, predicted_BM, True)
    return model(their_pixels(clip), hidden).logits


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Check that float32 tensors differ by at most 1e-5 of the largest value."""
    assert actual.dtype == torch.float32 and actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def assert_same_logits(path: Path, model: Any, clip: Tensor, *overrides: str) -> None:
    assert_same(outputs(load_model(path, *overrides), clip), their_logits(model, clip))
