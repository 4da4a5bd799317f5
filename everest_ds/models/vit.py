"""The Vision Transformer block that encoder, decoder and classifier share (VideoMAE's, pre-norm).

Shape legend: B clips, n tokens, D width, h heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everest_ds.config.backbones import LAYER_NORM_EPS, TransformerShape
from everest_ds.models.attention import ATTENTION
from everest_ds.models.linear import Linear, LinearWithoutBias, init_linear
from everest_ds.models.mlp import MLP
from everest_ds.models.sampling import drop_scale

DROP_PATH_STREAM = 16  # first of the streams of per-clip randomness; block i uses two: 16 + 2i and 17 + 2i


class Attention(nn.Module):
    """Multi-head self-attention; one projection for q, k and v, of which k has no bias."""

    def __init__(self, width: int, heads: int, kind: str = "fused") -> None:
        super().__init__()
        self.head_width = width // heads
        self.attend = ATTENTION[kind]
        self.qkv = LinearWithoutBias(width, 3 * width)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.proj = Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero the biases of its own."""
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = self.qkv(x_BnD, bias)
        return self.proj(self.attend(qkv.unflatten(-1, (3, -1, self.head_width))))


class Block(nn.Module):
    """Attention and MLP, each on a normalised input and added to it; drop path per clip."""

    def __init__(
        self,
        width: int,
        heads: int,
        drop_path: float = 0.0,
        index: int = 0,
        attention: str = "fused",
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.stream = DROP_PATH_STREAM + 2 * index
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads, attention)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width)

    def forward(self, x_BnD: Tensor, key_B: Tensor) -> Tensor:
        """(B, n, D), and the clips' random keys (B,) -> (B, n, D)."""
        x_BnD = x_BnD + self._drop(self.attention(self.norm1(x_BnD)), key_B, self.stream)
        return x_BnD + self._drop(self.mlp(self.norm2(x_BnD)), key_B, self.stream + 1)

    def _drop(self, branch: Tensor, key_B: Tensor, stream: int) -> Tensor:
        if not self.training or self.drop_path == 0.0:
            return branch
        return branch * drop_scale(key_B, stream, 1, self.drop_path).to(branch.dtype)[:, :, None]


class Blocks(nn.ModuleList):
    """A stack of blocks whose drop path grows linearly from 0 to `drop_path`."""

    def __init__(
        self,
        shape: TransformerShape,
        drop_path: float = 0.0,
        attention: str = "fused",
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        last = max(shape.depth - 1, 1)
        super().__init__(
            Block(shape.width, shape.heads, drop_path * i / last, i, attention, norm_eps)
            for i in range(shape.depth)
        )

    def forward(self, x_BnD: Tensor, key_B: Tensor) -> Tensor:
        """(B, n, D) -> (B, n, D), through every block."""
        for block in self:
            x_BnD = block(x_BnD, key_B)
        return x_BnD


def init_weights(module: nn.Module) -> None:
    """Xavier-uniform linears, zero biases, unit norms (VideoMAE), of any `nn.Linear`; use with `apply`."""
    if isinstance(module, nn.Linear):
        init_linear(module)
