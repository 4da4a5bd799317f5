"""The pre-norm Vision Transformer block of VideoMAE, shared by encoder and decoder.

Shape legend: B clips, n tokens, D width, h heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everest_ds.config.backbones import LAYER_NORM_EPS, TransformerShape
from everest_ds.models.attention import ATTENTION
from everest_ds.models.linear import Linear, LinearWithoutBias, init_linear
from everest_ds.models.mlp import MLP
from everest_ds.models.sampling import drop_scales

DROP_PATH_STREAM = 16  # first stream of per-clip randomness; block i uses the streams 16 + 2i and 17 + 2i

Scales = tuple[Tensor, Tensor]  # drop-path factors of attention and MLP, (B, 1, 1) each


class Attention(nn.Module):
    """Multi-head self-attention with one projection for q, k and v; k has no bias."""

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
        """Set the biases of q and v to zero."""
        nn.init.zeros_(self.q_bias)
        nn.init.zeros_(self.v_bias)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """Apply self-attention: (B, n, D) -> (B, n, D)."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        qkv = self.qkv(x_BnD, bias)
        return self.proj(self.attend(qkv.unflatten(-1, (3, -1, self.head_width))))


class Block(nn.Module):
    """A pre-norm transformer block: attention and MLP, each with LayerNorm and a residual connection.

    A block stores neither its place in the stack nor its drop-path rate, so one compiled graph serves all
    blocks.
    """

    def __init__(
        self, width: int, heads: int, attention: str = "fused", norm_eps: float = LAYER_NORM_EPS
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads, attention)
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width)

    def forward(self, x_BnD: Tensor, scales: Scales | None = None) -> Tensor:
        """Apply the block, (B, n, D) -> (B, n, D), with each branch multiplied by its scale, if any."""
        of_attention, of_mlp = scales or (None, None)
        x_BnD = add_scaled(x_BnD, self.attention(self.norm1(x_BnD)), of_attention)
        return add_scaled(x_BnD, self.mlp(self.norm2(x_BnD)), of_mlp)


def add_scaled(x_BnD: Tensor, branch_BnD: Tensor, scale_B11: Tensor | None) -> Tensor:
    """Add a residual branch to `x_BnD`, multiplied by its scale if there is one."""
    return x_BnD + (branch_BnD if scale_B11 is None else branch_BnD * scale_B11)


class Blocks(nn.ModuleList):
    """A stack of blocks whose drop-path rate grows linearly from 0 to `drop_path` in the last block."""

    def __init__(
        self,
        shape: TransformerShape,
        drop_path: float = 0.0,
        attention: str = "fused",
        norm_eps: float = LAYER_NORM_EPS,
    ) -> None:
        super().__init__(Block(shape.width, shape.heads, attention, norm_eps) for _ in range(shape.depth))
        self.drop_path = drop_path

    def forward(self, x_BnD: Tensor, key_B: Tensor) -> Tensor:
        """Apply all blocks, (B, n, D) -> (B, n, D); the random keys (B,) of the clips drive drop path."""
        for block, scales in zip(self, self._scales(key_B, x_BnD.dtype), strict=True):
            x_BnD = block(x_BnD, scales)
        return x_BnD

    def _scales(self, key_B: Tensor, dtype: torch.dtype) -> list[Scales] | list[None]:
        """Draw the drop-path factors of all blocks with one hash; None per block without drop path."""
        if not self.training or self.drop_path == 0.0:
            return [None] * len(self)
        block_S = torch.arange(2 * len(self), device=key_B.device) // 2
        rate_S = self.drop_path * block_S.double() / max(len(self) - 1, 1)
        scale_SB = drop_scales(key_B, DROP_PATH_STREAM, rate_S).to(dtype)
        scales = scale_SB[:, :, None, None].unbind()
        return list(zip(scales[::2], scales[1::2], strict=True))


def init_weights(module: nn.Module) -> None:
    """Initialise a module as VideoMAE does if it is an `nn.Linear`; for use with `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        init_linear(module)
