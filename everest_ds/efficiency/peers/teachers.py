"""MVD's teachers: frozen encoders of two other masked autoencoders, whose features the student predicts.

The image teacher is MAE's encoder (He et al., CVPR 2022; github.com/facebookresearch/mae), the video teacher
VideoMAE's (Tong et al., NeurIPS 2022). Both run on all tokens and return the output of their last block; the
final LayerNorm, which their checkpoints contain, is not applied (github.com/ruiwang2021/mvd,
modeling_teacher.py and modeling_video_teacher.py). The teachers are never trained here, so their weights must
be loaded.

Shape legend: B clips, F frames, H x W pixels, T slots, L places per slot, N = T·L tokens, P values of a
tubelet, D width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from everest_ds.config.backbones import TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.masked import MaskedEncoder
from everest_ds.models.linear import linear
from everest_ds.models.positions import image_positions
from everest_ds.models.tubelets import TubeletEmbedding, sincos_positions, to_tubelets
from everest_ds.models.vit import LAYER_NORM_EPS, Attention, Blocks


class VideoTeacher(nn.Module):
    """The video teacher: VideoMAE's encoder on all tokens of a clip."""

    def __init__(self, geometry: ClipGeometry, shape: TransformerShape, attention: str = "fused") -> None:
        super().__init__()
        self.geometry = geometry
        positions_ND = sincos_positions(geometry.num_tokens, shape.width)
        self.encoder = MaskedEncoder(geometry, shape, positions_ND, attention=attention)

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor) -> Tensor:
        """Return the features of every token: uint8 clips (B, F, H, W, 3), keys (B,) -> (B, N, D)."""
        x_BND = self.encoder.embed_all(to_tubelets(clip_BFHWC, self.geometry))
        return self.encoder.blocks(x_BND, key_B)


class ImageTeacher(nn.Module):
    """The image teacher: MAE's encoder on the first frame of every slot, as separate images."""

    positions: Tensor

    def __init__(self, geometry: ClipGeometry, shape: TransformerShape, attention: str = "fused") -> None:
        super().__init__()
        self.every = geometry.tubelet_size
        self.geometry = replace(geometry, num_frames=geometry.num_slots, tubelet_size=1)
        self.embed = TubeletEmbedding(self.geometry, shape.width)
        self.class_token = nn.Parameter(torch.zeros(shape.width))
        self.blocks = Blocks(shape, attention=attention)
        for block in self.blocks:
            block.attention = BiasedAttention(shape.width, shape.heads, attention)
        self.norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.register_buffer("positions", image_positions(geometry.grid_size, shape.width), persistent=False)

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor) -> Tensor:
        """Return the features of every patch: uint8 clips (B, F, H, W, 3), keys (B,) -> (B, N, D)."""
        patches = to_tubelets(clip_BFHWC[:, :: self.every], self.geometry)
        patches = patches.reshape(-1, self.geometry.tokens_per_slot, patches.shape[-1])
        x_ILD = self.embed()(patches)  # I = B·T images
        x_ILD = x_ILD + self.positions.to(x_ILD.dtype)
        class_I1D = self.class_token.to(x_ILD.dtype).expand(len(x_ILD), 1, -1)  # its position embedding is 0
        x = self.blocks(torch.cat([class_I1D, x_ILD], dim=1), key_B)
        return x[:, 1:].reshape(len(clip_BFHWC), -1, x.shape[-1])


class BiasedAttention(Attention):
    """Attention with a bias on the keys as well, which MAE's checkpoints contain.

    The bias adds the same value to all logits of a query, which softmax ignores; VideoMAE's blocks omit it.
    """

    def __init__(self, width: int, heads: int, kind: str = "fused") -> None:
        super().__init__(width, heads, kind)
        self.k_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_BnD: Tensor) -> Tensor:
        """Attend within each sequence: (B, n, D) -> (B, n, D)."""
        qkv = linear(x_BnD, self.qkv.weight, torch.cat([self.q_bias, self.k_bias, self.v_bias]))
        return self.proj(self.attend(qkv.unflatten(-1, (3, -1, self.head_width))))
