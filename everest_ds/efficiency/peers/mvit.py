"""MViT: a transformer whose tokens become fewer and wider from stage to stage, by pooling.

Fan et al., "Multiscale Vision Transformers", ICCV 2021; github.com/facebookresearch/SlowFast
(slowfast/models/attention.py, configs/Kinetics/MVIT_B_16x4_CONV.yaml). Queries are pooled in the first block
of a stage, which reduces the number of tokens; keys and values are pooled in every block, which makes
attention over 25,088 tokens affordable. The published 70.5 GFLOPs are those of the max-pooling variant.

Shape legend: B clips, F frames, H x W pixels, h heads, n = 1 + t·y·x tokens (class token first), m pooled
tokens, D width, d width of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from everest_ds.config.backbones import MLP_RATIO
from everest_ds.efficiency.peers.layers import (
    DROPOUT_STREAM,
    Drop,
    VideoClassifier,
    drop_path_rates,
    init_peer_weights,
    table,
    with_token,
)
from everest_ds.efficiency.peers.mvit_plan import MVIT_B, BlockPlan, MViTShape, TokenGrid, plan_blocks
from everest_ds.models.linear import Linear
from everest_ds.models.mlp import GELULinear
from everest_ds.models.tubelets import normalize_pixels
from everest_ds.models.vit import DROP_PATH_STREAM, LAYER_NORM_EPS

Pooling = Literal["conv", "max"]
_DROP_PATH, _DROPOUT = 0.2, 0.5


class GridPool(nn.Module):
    """A pooling layer over the token grid, the same for every head; the class token is not pooled.

    Args:
        grid: token grid of the input.
        pool: pooling layer on (B·h, d, t, y, x), which reduces the grid.
        norm: normalisation of the output, class token included.
    """

    def __init__(self, grid: TokenGrid, pool: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.grid, self.pool, self.norm = grid, pool, norm

    def forward(self, x_Bhnd: Tensor) -> Tensor:
        """Pool the tokens of each head: (B, h, n, d) -> (B, h, m, d)."""
        t, y, x = self.grid
        maps = rearrange(x_Bhnd[:, :, 1:], "b h (t y x) d -> (b h) d t y x", t=t, y=y, x=x)
        patches = rearrange(self.pool(maps), "(b h) d t y x -> b h (t y x) d", h=x_Bhnd.shape[1])
        return self.norm(torch.cat([x_Bhnd[:, :, :1], patches], dim=2))


def max_pool(grid: TokenGrid, stride: int) -> GridPool:
    """Build spatial max pooling whose windows are one place wider than the stride."""
    size = stride + 1
    pool = nn.MaxPool3d((1, size, size), (1, stride, stride), (0, size // 2, size // 2))
    return GridPool(grid, pool, nn.Identity())


def conv_pool(grid: TokenGrid, stride: int, width: int) -> GridPool:
    """Build pooling by a depthwise 3 x 3 x 3 convolution, followed by LayerNorm."""
    pool = nn.Conv3d(width, width, 3, (1, stride, stride), padding=1, groups=width, bias=False)
    return GridPool(grid, pool, nn.LayerNorm(width, eps=LAYER_NORM_EPS))


class PoolingAttention(nn.Module):
    """Attention of pooled queries over pooled keys and values."""

    def __init__(self, plan: BlockPlan, pooling: Pooling) -> None:
        super().__init__()
        self.heads = plan.heads
        self.qkv = Linear(plan.width, 3 * plan.width)
        self.pool_q = _pool(plan, plan.q_stride, pooling) if plan.q_stride > 1 else nn.Identity()
        self.pool_k = _pool(plan, plan.kv_stride, pooling)
        self.pool_v = _pool(plan, plan.kv_stride, pooling)
        self.proj = Linear(plan.width, plan.width)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """Attend, with m the number of pooled queries: (B, n, D) -> (B, m, D)."""
        q, k, v = rearrange(self.qkv(x_BnD), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        out = F.scaled_dot_product_attention(self.pool_q(q), self.pool_k(k), self.pool_v(v))
        return self.proj(rearrange(out, "b h m d -> b m (h d)"))


def _pool(plan: BlockPlan, stride: int, pooling: Pooling) -> nn.Module:
    if pooling == "conv":  # applies at stride 1 too, where it still mixes each place with its neighbours
        return conv_pool(plan.grid, stride, plan.width // plan.heads)
    return max_pool(plan.grid, stride) if stride > 1 else nn.Identity()


class PoolingBlock(nn.Module):
    """A pre-norm block of pooling attention and an MLP that may widen; skip paths pool and widen alike."""

    def __init__(self, plan: BlockPlan, pooling: Pooling, drop_path: float, index: int) -> None:
        super().__init__()
        width, hidden = plan.width, MLP_RATIO * plan.width
        self.attention_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attention = PoolingAttention(plan, pooling)
        self.pool_skip = max_pool(plan.grid, plan.q_stride) if plan.q_stride > 1 else nn.Identity()
        self.mlp_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp = nn.Sequential(Linear(width, hidden), GELULinear(hidden, plan.out_width))
        self.widen_skip = Linear(width, plan.out_width) if plan.out_width != width else None
        self.attention_drop = Drop(drop_path, DROP_PATH_STREAM + 2 * index)
        self.mlp_drop = Drop(drop_path, DROP_PATH_STREAM + 2 * index + 1)

    def forward(self, x_BnD: Tensor, key_B: Tensor) -> Tensor:
        """Run the block: (B, n, D) -> (B, m, out_width)."""
        attended = self.attention_drop(self.attention(self.attention_norm(x_BnD)), key_B)
        x_BmD = self.pool_skip(x_BnD[:, None])[:, 0] + attended
        normed = self.mlp_norm(x_BmD)
        skip = x_BmD if self.widen_skip is None else self.widen_skip(normed)
        return skip + self.mlp_drop(self.mlp(normed), key_B)


class MViT(VideoClassifier):
    """A classifier of a convolutional stem, learned positions, pooling blocks, and a class-token head."""

    def __init__(
        self, shape: MViTShape, num_frames: int, image_size: int, num_classes: int, pooling: Pooling
    ) -> None:
        super().__init__((num_frames, image_size, image_size, 3))
        kernel, stride, padding = shape.stem_kernel, shape.stem_stride, shape.stem_padding
        self.stem = nn.Conv3d(3, shape.width, (3, kernel, kernel), (2, stride, stride), (1, padding, padding))
        side = (image_size + 2 * padding - kernel) // stride + 1
        plans = list(plan_blocks(shape, ((num_frames + 1) // 2, side, side)))
        self.class_token = table(shape.width)
        self.class_position = table(shape.width)
        self.places = table(side**2, shape.width)
        self.times = table(plans[0].grid[0], shape.width)
        rates = drop_path_rates(len(plans), _DROP_PATH)
        self.blocks = nn.ModuleList(PoolingBlock(plan, pooling, rates[i], i) for i, plan in enumerate(plans))
        self.norm = nn.LayerNorm(plans[-1].out_width, eps=LAYER_NORM_EPS)
        self.drop = Drop(_DROPOUT, DROPOUT_STREAM, plans[-1].out_width)
        self.head = nn.Linear(plans[-1].out_width, num_classes)
        self.apply(init_peer_weights)

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor) -> Tensor:
        """Compute the logits (B, classes) of uint8 clips (B, F, H, W, 3); the keys (B,) drive randomness."""
        x_BnD = self._tokens(clip_BFHWC)
        for block in self.blocks:
            x_BnD = block(x_BnD, key_B)
        return self.head(self.drop(self.norm(x_BnD)[:, 0], key_B))

    def _tokens(self, clip_BFHWC: Tensor) -> Tensor:
        """Embed the clip as class token and patches with their positions: (B, n, D)."""
        pixels = rearrange(normalize_pixels(clip_BFHWC), "b f h w c -> b c f h w").to(self.stem.weight.dtype)
        patches = rearrange(self.stem(pixels), "b d t y x -> b (t y x) d")
        positions = (self.times[:, None] + self.places).flatten(0, 1)
        return with_token(self.class_token + self.class_position, patches + positions)


def build_mvit(
    shape: MViTShape = MVIT_B,
    num_frames: int = 16,
    image_size: int = 224,
    num_classes: int = 400,
    pooling: Pooling = "max",
) -> MViT:
    """Build MViT, by default MViT-B 16x4 as published for K400.

    Args:
        shape: `MVIT_B`, `MVIT_S` or another size.
        num_frames: frames per clip.
        image_size: height and width of the frames, in pixels.
        num_classes: number of classes.
        pooling: `conv` is the more accurate variant, `max` the variant whose compute was published.
    """
    return MViT(shape, num_frames, image_size, num_classes, pooling)
