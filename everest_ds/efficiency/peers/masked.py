"""Encoder and decoder of a masked video autoencoder as released by VideoMAE and reused by MME and MVD.

Unlike our own encoder (models/encoder.py), this one embeds every token before it drops the masked tokens, and
the decoder processes all tokens. Source: VideoMAE (Tong et al., NeurIPS 2022), github.com/MCG-NJU/VideoMAE.

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
    """An encoder that embeds all tokens, adds positions, and runs its blocks on the visible tokens.

    Args:
        geometry: geometry of the clip.
        shape: width, depth and heads.
        positions_ND: fixed position embeddings, added to the embedded tokens.
        drop_path: largest drop-path rate of the blocks.
        attention: `fused` or `unfused`.
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
        """Encode the visible tubelets: uint8 tubelets (B, N, P), visible indices (B, V) -> (B, V, D)."""
        x_BVD = gather_tokens(self.embed_all(tubelets_BNP), visible_BV)
        return self.norm(self.blocks(x_BVD, key_B))

    def embed_all(self, tubelets_BNP: Tensor) -> Tensor:
        """Embed all tubelets and add their positions: uint8 (B, N, P) -> (B, N, D)."""
        x_BND = self.embed()(tubelets_BNP)
        return x_BND + self.positions.to(x_BND.dtype)


class MaskedDecoder(nn.Module):
    """A decoder that runs visible features and mask tokens through its blocks and returns the masked tokens.

    Args:
        encoder_width: D.
        shape: width (d), depth and heads of the decoder.
        positions_Nd: fixed position embeddings of the decoder's width.
        bias: add a bias to the linear map from D to d.
        stream: this decoder's stream number of per-clip randomness, which makes its drop paths independent of
            the encoder's.
        drop_path: largest drop-path rate of the blocks.
        attention: `fused` or `unfused`.
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
        """Decode the features of the masked tokens from the encoder's: (B, V, D) -> (B, M, d)."""
        x_BVd = self.project(x_BVD)
        positions = self.positions.to(x_BVd.dtype)
        full = torch.cat([x_BVd + positions[visible_BV], self.mask_token + positions[masked_BM]], dim=1)
        full = self.blocks(full, random_bits(key_B, self.stream, 1)[:, 0])
        return self.norm(full[:, visible_BV.shape[1] :])
