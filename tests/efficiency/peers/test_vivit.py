"""Tests of ViViT: its two encoders equal PyTorch's transformer, run slot by slot."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everest_ds.efficiency.peers.vivit import SequenceEncoder, ViViT
from everest_ds.models.tubelets import to_tubelets
from tests.efficiency.peers.small_peers import SHAPE, TUBELETS, noise, randomized, small

KEYS = torch.tensor([5, 6])


def torch_layer(block: nn.Module) -> nn.TransformerEncoderLayer:
    layer = nn.TransformerEncoderLayer(
        SHAPE.width, SHAPE.heads, 4 * SHAPE.width, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True
    )
    weights = {
        f"{theirs}.{part}": block.get_parameter(f"{ours}.{part}")
        for theirs, ours in {
            "self_attn.out_proj": "attention.proj",
            "linear1": "mlp.fc1",
            "linear2": "mlp.fc2",
            "norm1": "norm1",
            "norm2": "norm2",
        }.items()
        for part in ("weight", "bias")
    }
    weights["self_attn.in_proj_weight"] = block.get_parameter("attention.qkv.weight")
    weights["self_attn.in_proj_bias"] = block.get_parameter("attention.qkv.bias")
    layer.load_state_dict(weights)
    return layer


def torch_encoder(encoder: SequenceEncoder, x_nD: Tensor) -> Tensor:
    """Encode one sequence by PyTorch's transformer layers: (n, D) -> (D,)."""
    x = torch.cat([encoder.class_token[None], x_nD])[None] + encoder.positions
    for block in encoder.blocks:
        x = torch_layer(block)(x)
    return encoder.norm(x)[0, 0]


def test_equal_to_pytorchs_transformer_slot_by_slot() -> None:
    model = small("vivit")
    assert isinstance(model, ViViT)
    randomized(model)
    clips = noise(model)
    tokens = model.embed()(to_tubelets(clips, TUBELETS)).unflatten(1, (TUBELETS.num_slots, -1))
    for clip, logits in zip(tokens, model(clips, KEYS), strict=True):
        slots = torch.stack([torch_encoder(model.space, slot) for slot in clip])
        expected = model.head(torch_encoder(model.time, slots))
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
