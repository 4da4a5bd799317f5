"""ViViT with a factorised encoder: a spatial transformer within each slot, then a temporal one over slots.

Arnab et al., "ViViT: A Video Vision Transformer", ICCV 2021, model 2; github.com/google-research/scenic
(scenic/projects/vivit, configs/kinetics400/vivit_large_factorised_encoder.py). Both transformers have the
same structure: a leading class token, learned positions, blocks, LayerNorm, and the class token as the
output. In the released large model, each has 24 blocks.

Shape legend: B clips, F frames, H x W pixels, T slots, L places per slot, n tokens, D width.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.layers import (
    SelfAttention,
    VideoClassifier,
    blocks_with,
    init_peer_weights,
    table,
    with_token,
)
from everest_ds.models.tubelets import TubeletEmbedding, to_tubelets
from everest_ds.models.vit import LAYER_NORM_EPS


class SequenceEncoder(nn.Module):
    """A transformer that summarises a sequence in its class token.

    Args:
        shape: width, depth and heads.
        num_tokens: n, without the class token.
    """

    def __init__(self, shape: TransformerShape, num_tokens: int) -> None:
        super().__init__()
        self.class_token = table(shape.width)
        self.positions = table(1 + num_tokens, shape.width)
        self.blocks = blocks_with(lambda: SelfAttention(shape.width, shape.heads), shape)
        self.norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)

    def forward(self, x_BnD: Tensor, key_B: Tensor) -> Tensor:
        """Encode each sequence in its class token: (B, n, D) -> (B, D)."""
        x_BnD = with_token(self.class_token, x_BnD) + self.positions
        return self.norm(self.blocks(x_BnD, key_B))[:, 0]


class ViViT(VideoClassifier):
    """A classifier of tubelet embedding, spatial encoder within each slot, temporal encoder, and head."""

    def __init__(
        self, geometry: ClipGeometry, space: TransformerShape, time: TransformerShape, num_classes: int
    ) -> None:
        super().__init__((geometry.num_frames, geometry.image_size, geometry.image_size, 3))
        self.geometry = geometry
        self.embed = TubeletEmbedding(geometry, space.width)
        self.space = SequenceEncoder(space, geometry.tokens_per_slot)
        self.time = SequenceEncoder(time, geometry.num_slots)
        self.head = nn.Linear(time.width, num_classes)
        self.apply(init_peer_weights)

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor) -> Tensor:
        """Compute the class logits (B, classes) of uint8 clips (B, F, H, W, 3)."""
        x_BND = self.embed()(to_tubelets(clip_BFHWC, self.geometry))
        slots = x_BND.unflatten(1, (self.geometry.num_slots, -1)).flatten(0, 1)
        # The slots are given the clips' keys, which no block reads because there is no drop path.
        slots_BTD = self.space(slots, key_B).unflatten(0, (-1, self.geometry.num_slots))
        return self.head(self.time(slots_BTD, key_B))


def build_vivit(
    geometry: ClipGeometry = ClipGeometry(num_frames=128),
    shape: TransformerShape = BACKBONES["vit_large"].encoder,
    temporal_depth: int = 24,
    num_classes: int = 400,
) -> ViViT:
    """Build ViViT, by default ViViT-L/16x2 FE for 128 frames, as in its K400 result.

    Args:
        geometry: geometry of the clip.
        shape: shape of the spatial encoder; the temporal encoder has the same width and heads.
        temporal_depth: number of blocks in the temporal encoder.
        num_classes: number of classes.
    """
    return ViViT(geometry, shape, replace(shape, depth=temporal_depth), num_classes)
