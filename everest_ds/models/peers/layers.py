"""What the video classifiers share: an interface, attention with the usual biases, and drops by key.

All of them take uint8 clips and the clips' random keys, as our own classifier does, and normalise pixels by
ImageNet's statistics. Some were released with other constants, which the weights of a first layer take up.

Shape legend: B clips, F frames, H x W pixels, n tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from everest_ds.config.backbones import TransformerShape
from everest_ds.models.attention import fused_attention
from everest_ds.models.linear import Linear
from everest_ds.models.sampling import random_uniform
from everest_ds.models.vit import Blocks

# Streams of per-clip randomness; masks.py has those from 0 on, MME and MVD 8 and 9, drop path 16 and up.
SAMPLER_STREAM = 10
DROPOUT_STREAM = 11


class VideoClassifier(nn.Module):
    """Class logits (B, classes) of uint8 clips (B, F, H, W, 3) and their keys (B,).

    Args:
        clip_shape: (F, H, W, 3) of one view.
    """

    def __init__(self, clip_shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.clip_shape = clip_shape

    def blank_inputs(self, num_clips: int) -> tuple[Tensor, Tensor]:
        """Zeros in place of the forward pass's arguments, for those who trace and need no values."""
        like = next(self.parameters()).new_zeros
        return like(num_clips, *self.clip_shape, dtype=torch.uint8), like(num_clips, dtype=torch.int64)


class SelfAttention(nn.Module):
    """Multi-head self-attention whose q, k and v all have a bias, or none (`vit.Attention` gives k none)."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.proj = Linear(width, width)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        return self.proj(fused_attention(self.qkv(x_BnD).unflatten(-1, (3, self.heads, -1))))


class Drop(nn.Module):
    """Zeroes what it is given of a clip at random, in training, and scales up what is left.

    Args:
        rate: how often.
        stream: of per-clip randomness.
        width: 1 drops all of a clip at once (drop path), D single features (dropout).
    """

    def __init__(self, rate: float, stream: int, width: int = 1) -> None:
        super().__init__()
        self.rate, self.stream, self.width = rate, stream, width

    def forward(self, x: Tensor, key_B: Tensor) -> Tensor:
        """(B, ..., D) -> the same shape."""
        if not self.training or self.rate == 0.0:
            return x
        survives = random_uniform(key_B, self.stream, self.width) >= self.rate
        scale = (survives / (1 - self.rate)).to(x.dtype)
        return x * scale.view(len(key_B), *[1] * (x.dim() - 2), self.width)


def blocks_with(
    attention: Callable[[], nn.Module], shape: TransformerShape, drop_path: float = 0.0
) -> Blocks:
    """Our own stack of pre-norm blocks with another attention in each: (B, n, D) -> (B, n, D)."""
    blocks = Blocks(shape, drop_path)
    for block in blocks:
        block.attention = attention()
    return blocks


def drop_path_rates(depth: int, last: float) -> list[float]:
    """From 0 in the first block to `last` in the last one, linearly."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def table(*shape: int) -> nn.Parameter:
    """A learned table of positions, or a learned token."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def with_token(token: Tensor, x_BnD: Tensor) -> Tensor:
    """Put the token, (D,) or (B, 1, D), in front of every sequence: (B, n, D) -> (B, 1 + n, D)."""
    return torch.cat([token.to(x_BnD.dtype).expand(len(x_BnD), 1, -1), x_BnD], dim=1)


def init_weights(module: nn.Module) -> None:
    """Truncated normal linears of deviation 0.02, zero biases, as all of these systems begin."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
