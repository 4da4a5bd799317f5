"""The two halves of a masked video autoencoder in the form that VideoMAE released, and MME and MVD built on.

Unlike ours (models/encoder.py), the encoder embeds every token before it drops the masked ones, and the
decoder sees all tokens. Source: VideoMAE (Tong et al., NeurIPS 2022), github.com/MCG-NJU/VideoMAE.

Shape legend: B clips, N tokens, V visible, M = N - V masked, P values of a tubelet, D encoder width,
d decoder width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everest_ds.config.backbones import TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.linear import Linear
from everest_ds.models.sampling import random_bits
from everest_ds.models.tubelets import TubeletEmbedding, gather_tokens
from everest_ds.models.vit import LAYER_NORM_EPS, Blocks


class MaskedEncoder(nn.Module):
    """Embedding of all tokens, positions, blocks on the visible ones, LayerNorm.

    Args:
        positions_ND: fixed, added to the embedded tokens.
    """

    positions: Tensor

    def __init__(
        self,
        geometry: ClipGeometry,
        shape: TransformerShape,
        positions_ND: Tensor,
        drop_path: float = 0.0,
        attention: str = "fused",
    ) -> None:
        super().__init__()
        self.embed = TubeletEmbedding(geometry, shape.width)
        self.blocks = Blocks(shape, drop_path, attention)
        self.norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.register_buffer("positions", positions_ND, persistent=False)

    def forward(self, tubelets_BNP: Tensor, visible_BV: Tensor, key_B: Tensor) -> Tensor:
        """uint8 tubelets (B, N, P) and indices of the visible ones (B, V) -> features (B, V, D)."""
        x_BVD = gather_tokens(self.embed_all(tubelets_BNP), visible_BV)
        return self.norm(self.blocks(x_BVD, key_B))

    def embed_all(self, tubelets_BNP: Tensor) -> Tensor:
        """uint8 (B, N, P) -> embedded tokens, with positions: (B, N, D)."""
        x_BND = self.embed()(tubelets_BNP)
        return x_BND + self.positions.to(x_BND.dtype)


class MaskedDecoder(nn.Module):
    """Visible features and mask tokens, each with its position, through blocks; masked tokens come out.

    Args:
        encoder_width: D.
        positions_Nd: fixed, of the decoder's width.
        bias: whether the map from D to d has one.
        stream: of per-clip randomness, this decoder's own, so that its drop paths are not the encoder's.
    """

    positions: Tensor

    def __init__(
        self,
        encoder_width: int,
        shape: TransformerShape,
        positions_Nd: Tensor,
        *,
        bias: bool,
        stream: int,
        drop_path: float = 0.0,
        attention: str = "fused",
    ) -> None:
        super().__init__()
        self.stream = stream
        self.project = Linear(encoder_width, shape.width, bias=bias)
        self.mask_token = nn.Parameter(torch.zeros(shape.width))
        self.blocks = Blocks(shape, drop_path, attention)
        self.norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.register_buffer("positions", positions_Nd, persistent=False)

    def forward(self, x_BVD: Tensor, visible_BV: Tensor, masked_BM: Tensor, key_B: Tensor) -> Tensor:
        """The encoder's features (B, V, D) -> features of the masked tokens (B, M, d)."""
        x_BVd = self.project(x_BVD)
        positions = self.positions.to(x_BVd.dtype)
        full = torch.cat([x_BVd + positions[visible_BV], self.mask_token + positions[masked_BM]], dim=1)
        full = self.blocks(full, random_bits(key_B, self.stream, 1)[:, 0])
        return self.norm(full[:, visible_BV.shape[1] :])
