"""Building blocks shared by the video classifiers: interface, attention with biases, and keyed dropout.

All classifiers take uint8 clips and the clips' random keys, as our own classifier does, and normalise pixels
by ImageNet's statistics. Some were released with other constants, which a first layer's weights can absorb.

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

# Stream numbers of per-clip randomness; masks.py uses 0 and up, MME and MVD 8 and 9, drop path 16 and up.
SAMPLER_STREAM = 10
DROPOUT_STREAM = 11


class VideoClassifier(nn.Module):
    """Base class of the classifiers, which map uint8 clips (B, F, H, W, 3) and keys (B,) to class logits.

    Args:
        clip_shape: shape of one view, (F, H, W, 3).
    """

    def __init__(self, clip_shape: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.clip_shape = clip_shape

    def blank_inputs(self, num_clips: int) -> tuple[Tensor, Tensor]:
        """Return zeros for the arguments of the forward pass, for tracing, which needs no values."""
        like = next(self.parameters()).new_zeros
        return like(num_clips, *self.clip_shape, dtype=torch.uint8), like(num_clips, dtype=torch.int64)


class SelfAttention(nn.Module):
    """Multi-head self-attention with a bias on q, k and v, or on none (`vit.Attention` omits it on k)."""

    def __init__(self, width: int, heads: int, bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=bias)
        self.proj = Linear(width, width)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """Attend within each sequence: (B, n, D) -> (B, n, D)."""
        return self.proj(fused_attention(self.qkv(x_BnD).unflatten(-1, (3, self.heads, -1))))


class Drop(nn.Module):
    """Drop path or dropout driven by the clips' keys: zeroes inputs in training and rescales the others.

    Args:
        rate: probability of being zeroed.
        stream: stream number of per-clip randomness.
        width: 1 zeroes a clip's whole input (drop path); D zeroes single features (dropout).
    """

    def __init__(self, rate: float, stream: int, width: int = 1) -> None:
        super().__init__()
        self.rate, self.stream, self.width = rate, stream, width

    def forward(self, x: Tensor, key_B: Tensor) -> Tensor:
        """Zero and rescale in training, otherwise return the input: (B, ..., D) -> (B, ..., D)."""
        if not self.training or self.rate == 0.0:
            return x
        survives = random_uniform(key_B, self.stream, self.width) >= self.rate
        scale = (survives / (1 - self.rate)).to(x.dtype)
        return x * scale.view(len(key_B), *[1] * (x.dim() - 2), self.width)


def blocks_with(
    attention: Callable[[], nn.Module], shape: TransformerShape, drop_path: float = 0.0
) -> Blocks:
    """Build our own stack of pre-norm blocks, with the attention of each block replaced by `attention()`."""
    blocks = Blocks(shape, drop_path)
    for block in blocks:
        block.attention = attention()
    return blocks


def drop_path_rates(depth: int, last: float) -> list[float]:
    """Return drop-path rates that rise linearly from 0 in the first block to `last` in the last block."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def table(*shape: int) -> nn.Parameter:
    """Create a learned table of positions, or a learned token, from a truncated normal distribution."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def with_token(token: Tensor, x_BnD: Tensor) -> Tensor:
    """Put the token, (D,) or (B, 1, D), in front of every sequence: (B, n, D) -> (B, 1 + n, D)."""
    return torch.cat([token.to(x_BnD.dtype).expand(len(x_BnD), 1, -1), x_BnD], dim=1)


def init_peer_weights(module: nn.Module) -> None:
    """Initialise linear layers as all peers do: truncated normal weights (deviation 0.02), zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
