"""X-ViT: attention within each frame, with channels of keys and values taken from the neighbouring frames.

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021;
github.com/1adrianb/video-transformers (slowfast/models). One eighth of the channels of keys and values comes
from the next frame and one eighth from the previous frame. The receptive field thus grows by one frame in
each direction per block, at the cost of attention within single images.

Shape legend: B clips, T slots (frames), I = B·T images, S patches of a slot, n = 1 + S tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.kcenter import KCenterSampler
from everest_ds.efficiency.peers.layers import (
    DROPOUT_STREAM,
    Drop,
    SelfAttention,
    blocks_with,
    table,
    with_token,
)
from everest_ds.efficiency.peers.patches import AllPatches, PatchClassifier, PatchEmbedding
from everest_ds.efficiency.peers.timesformer import EIGHT_FRAMES
from everest_ds.models.attention import fused_attention
from everest_ds.models.vit import LAYER_NORM_EPS

NEIGHBOUR_SHARE = 8  # one channel in 8 comes from each neighbour
DROPOUT = 0.5


class MixingAttention(SelfAttention):
    """Attention within each frame over keys and values that contain channels of the neighbouring frames.

    Args:
        width: D.
        heads: number of attention heads.
        num_slots: T.
    """

    def __init__(self, width: int, heads: int, num_slots: int) -> None:
        super().__init__(width, heads)
        self.num_slots = num_slots

    def forward(self, x_InD: Tensor) -> Tensor:
        """Attend within each image, where a clip's images are consecutive: (I, n, D) -> (I, n, D)."""
        q, k, v = self.qkv(x_InD).chunk(3, dim=-1)
        qkv = torch.stack([q, mix_neighbours(k, self.num_slots), mix_neighbours(v, self.num_slots)], dim=2)
        return self.proj(fused_attention(qkv.unflatten(-1, (self.heads, -1))))


def mix_neighbours(x_InD: Tensor, num_slots: int) -> Tensor:
    """Replace the first eighth of a frame's channels by the next frame's, the second by the previous frame's.

    Frames beyond the ends of the clip count as zeros.

    Returns:
        (I, n, D), with every channel at its original index.
    """
    x_BTnD = x_InD.unflatten(0, (-1, num_slots))
    share = x_InD.shape[-1] // NEIGHBOUR_SHARE
    following, preceding, own = x_BTnD.split([share, share, x_InD.shape[-1] - 2 * share], dim=-1)
    following = F.pad(following[:, 1:], (0, 0, 0, 0, 0, 1))
    preceding = F.pad(preceding[:, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat([following, preceding, own], dim=-1).flatten(0, 1)


class TemporalHead(nn.Module):
    """A head: one block over the frames' class features and a class token, then a two-layer perceptron."""

    def __init__(self, width: int, heads: int, num_classes: int) -> None:
        super().__init__()
        self.class_token = table(width)
        attention = SelfAttention(width, heads, bias=False)
        self.blocks = blocks_with(lambda: attention, TransformerShape(width, 1, heads))
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.hidden = nn.Linear(width, width)
        self.drop = Drop(DROPOUT, DROPOUT_STREAM, width)
        self.out = nn.Linear(width, num_classes)

    def forward(self, x_BTD: Tensor, key_B: Tensor) -> Tensor:
        """Compute the class logits (B, classes) from the features of the frames (B, T, D)."""
        x_BD = self.blocks(with_token(self.class_token, x_BTD), key_B)[:, 0]
        return self.out(self.drop(F.gelu(self.hidden(self.norm(x_BD))), key_B))


class FrameBody(nn.Module):
    """A body that runs each frame, with its class token, through mixing attention, then a temporal head."""

    def __init__(self, shape: TransformerShape, num_slots: int, num_classes: int) -> None:
        super().__init__()
        self.blocks = blocks_with(lambda: MixingAttention(shape.width, shape.heads, num_slots), shape)
        self.norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.feature = nn.Linear(shape.width, shape.width)
        self.head = TemporalHead(shape.width, shape.heads, num_classes)

    def forward(self, class_BTD: Tensor, x_BTSD: Tensor, key_B: Tensor) -> Tensor:
        """Compute the class logits (B, classes)."""
        x_InD = with_token(class_BTD.flatten(0, 1)[:, None], x_BTSD.flatten(0, 1))
        # The images are given the clips' keys, which no block reads because there is no drop path.
        x_InD = self.norm(self.blocks(x_InD, key_B))
        frames_ID = self.feature(x_InD[:, 0]).tanh()
        return self.head(frames_ID.unflatten(0, class_BTD.shape[:2]), key_B)


def build_xvit(
    geometry: ClipGeometry = EIGHT_FRAMES,
    shape: TransformerShape = BACKBONES["vit_base"].encoder,
    num_classes: int = 400,
    sampler: KCenterSampler | None = None,
) -> PatchClassifier:
    """Build X-ViT, by default as published for 8 frames of K400.

    Args:
        geometry: geometry of the clip, with tubelets of one frame.
        shape: width, depth and heads.
        num_classes: number of classes.
        sampler: selects the patches; None uses all patches.
    """
    patches = sampler or AllPatches(geometry)
    embedding = PatchEmbedding(geometry, shape.width, class_per_slot=True)
    return PatchClassifier(geometry, patches, embedding, FrameBody(shape, patches.num_slots, num_classes))
