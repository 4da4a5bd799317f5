"""X-ViT: attention within a frame whose keys and values are mixed with the neighbouring frames' for free.

Bulat et al., "Space-time Mixing Attention for Video Transformer", NeurIPS 2021;
github.com/1adrianb/video-transformers (slowfast/models). An eighth of the channels of keys and values comes
from the frame after, an eighth from the frame before, so the receptive field grows by a frame in each
direction a block, at the cost of attention in images.

Shape legend: B clips, T slots (frames), I = B·T images, S patches of a slot, n = 1 + S tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.attention import fused_attention
from everest_ds.models.peers.kcenter import KCenterSampler
from everest_ds.models.peers.layers import DROPOUT_STREAM, Drop, SelfAttention, blocks_with, table, with_token
from everest_ds.models.peers.patches import AllPatches, PatchClassifier, PatchEmbedding
from everest_ds.models.peers.timesformer import EIGHT_FRAMES
from everest_ds.models.vit import LAYER_NORM_EPS

NEIGHBOUR_SHARE = 8  # one channel in this many comes from each neighbour
DROPOUT = 0.5


class MixingAttention(SelfAttention):
    """Attention within each frame, over keys and values that hold channels of the frames around.

    Args:
        num_slots: T.
    """

    def __init__(self, width: int, heads: int, num_slots: int) -> None:
        super().__init__(width, heads)
        self.num_slots = num_slots

    def forward(self, x_InD: Tensor) -> Tensor:
        """(I, n, D), a clip's images one after the other -> (I, n, D)."""
        q, k, v = self.qkv(x_InD).chunk(3, dim=-1)
        qkv = torch.stack([q, mix_neighbours(k, self.num_slots), mix_neighbours(v, self.num_slots)], dim=2)
        return self.proj(fused_attention(qkv.unflatten(-1, (self.heads, -1))))


def mix_neighbours(x_InD: Tensor, num_slots: int) -> Tensor:
    """Channels of the next frame, of the previous frame, then a frame's own; beyond the clip are zeros.

    Returns:
        (I, n, D), each channel where it was.
    """
    x_BTnD = x_InD.unflatten(0, (-1, num_slots))
    share = x_InD.shape[-1] // NEIGHBOUR_SHARE
    following, preceding, own = x_BTnD.split([share, share, x_InD.shape[-1] - 2 * share], dim=-1)
    following = F.pad(following[:, 1:], (0, 0, 0, 0, 0, 1))
    preceding = F.pad(preceding[:, :-1], (0, 0, 0, 0, 1, 0))
    return torch.cat([following, preceding, own], dim=-1).flatten(0, 1)


class TemporalHead(nn.Module):
    """A block over the frames' class features and a class token, and a two-layer perceptron on that."""

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
        """Class logits (B, classes)."""
        x_BD = self.blocks(with_token(self.class_token, x_BTD), key_B)[:, 0]
        return self.out(self.drop(F.gelu(self.hidden(self.norm(x_BD))), key_B))


class FrameBody(nn.Module):
    """Each frame, with its class token, through blocks of mixing attention; then the head over frames."""

    def __init__(self, shape: TransformerShape, num_slots: int, num_classes: int) -> None:
        super().__init__()
        self.blocks = blocks_with(lambda: MixingAttention(shape.width, shape.heads, num_slots), shape)
        self.norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.feature = nn.Linear(shape.width, shape.width)
        self.head = TemporalHead(shape.width, shape.heads, num_classes)

    def forward(self, class_BTD: Tensor, x_BTSD: Tensor, key_B: Tensor) -> Tensor:
        """Class logits (B, classes)."""
        x_InD = with_token(class_BTD.flatten(0, 1)[:, None], x_BTSD.flatten(0, 1))
        # keys of clips will do for images: without drop path no block asks for them
        x_InD = self.norm(self.blocks(x_InD, key_B))
        frames_ID = self.feature(x_InD[:, 0]).tanh()
        return self.head(frames_ID.unflatten(0, class_BTD.shape[:2]), key_B)


def build_xvit(
    geometry: ClipGeometry = EIGHT_FRAMES,
    shape: TransformerShape = BACKBONES["vit_base"].encoder,
    num_classes: int = 400,
    sampler: KCenterSampler | None = None,
) -> PatchClassifier:
    """X-ViT as published for 8 frames of K400, unless told other.

    Args:
        geometry: of the clip, with tubelets of one frame.
        shape: width, depth and heads.
        num_classes: of the logits.
        sampler: chooses the patches; all of them by default.
    """
    patches = sampler or AllPatches(geometry)
    embedding = PatchEmbedding(geometry, shape.width, class_per_slot=True)
    return PatchClassifier(geometry, patches, embedding, FrameBody(shape, patches.num_slots, num_classes))
