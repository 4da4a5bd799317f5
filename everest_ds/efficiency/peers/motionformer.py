"""Motionformer: attention along trajectories, which follow the content of a patch from frame to frame.

Patrick et al., "Keeping Your Eye on the Ball: Trajectory Attention in Video Transformers", NeurIPS 2021;
github.com/facebookresearch/Motionformer (slowfast/models/vit_helper.py, configs/K400). Each patch first
attends within every frame separately, which gives one token per frame: its trajectory. The patch then attends
over this trajectory. Projecting N trajectories of T tokens takes half of all compute.

The released code attends over unprojected values and notes that this is a typo kept for replication. Here
values are projected, as in the paper; the compute is the same.

Shape legend: B clips, T slots, S patches of a slot, N = T·S patches, n = 1 + N tokens, D width, h heads,
d width of a head.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.kcenter import KCenterSampler
from everest_ds.efficiency.peers.layers import blocks_with
from everest_ds.efficiency.peers.patches import AllPatches, PatchClassifier, PatchEmbedding, SequenceBody
from everest_ds.models.linear import Linear

_DROP_PATH = 0.2


class TrajectoryAttention(nn.Module):
    """Attention of each patch within every slot, then over the slots; the class token attends to all tokens.

    Args:
        width: D.
        heads: number of attention heads.
        num_slots: T.
    """

    def __init__(self, width: int, heads: int, num_slots: int) -> None:
        super().__init__()
        self.heads, self.num_slots = heads, num_slots
        self.qkv = Linear(width, 3 * width)
        self.trajectory_q = Linear(width, width)
        self.trajectory_kv = Linear(width, 2 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BnD: Tensor) -> Tensor:
        """Attend over tokens with the class token first: (B, n, D) -> (B, n, D)."""
        q, k, v = rearrange(self.qkv(x_BnD), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        of_class = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        of_class_B1D = rearrange(of_class, "b h n d -> b n (h d)")
        trajectories_BTND = self._trajectories(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])
        return self.proj(torch.cat([of_class_B1D, self._along(trajectories_BTND)], dim=1))

    def _trajectories(self, q_BhNd: Tensor, k_BhNd: Tensor, v_BhNd: Tensor) -> Tensor:
        """Attend from each of the N patches to each slot separately: (B, T, N, D)."""
        # Slots are folded into the heads, so that a fused kernel can compute attention within each slot.
        k, v = (rearrange(x, "b h (t s) d -> b (h t) s d", t=self.num_slots) for x in (k_BhNd, v_BhNd))
        found = F.scaled_dot_product_attention(q_BhNd.repeat_interleave(self.num_slots, dim=1), k, v)
        return rearrange(found, "b (h t) n d -> b t n (h d)", h=self.heads)

    def _along(self, x_BTND: Tensor) -> Tensor:
        """Attend over each patch's trajectory, with the token of its own slot as the query: (B, N, D)."""
        by_slot = x_BTND.unflatten(2, (self.num_slots, -1))
        own_BND = rearrange(by_slot.diagonal(dim1=1, dim2=2), "b s d t -> b (t s) d")
        q = rearrange(self.trajectory_q(own_BND), "b n (h d) -> (b n) h 1 d", h=self.heads)
        pattern = "b t n (two h d) -> two (b n) h t d"
        k, v = rearrange(self.trajectory_kv(x_BTND), pattern, two=2, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return rearrange(mixed, "(b n) h 1 d -> b n (h d)", b=len(x_BTND))


def build_motionformer(
    geometry: ClipGeometry = ClipGeometry(),
    shape: TransformerShape = BACKBONES["vit_base"].encoder,
    num_classes: int = 400,
    sampler: KCenterSampler | None = None,
) -> PatchClassifier:
    """Build Motionformer, by default as published for K400 (16 frames).

    Args:
        geometry: geometry of the clip.
        shape: width, depth and heads.
        num_classes: number of classes.
        sampler: selects the patches; None uses all patches. With a sampler, the head is a single linear map,
            as in the release of K-centered sampling.
    """
    patches, width = sampler or AllPatches(geometry), shape.width
    attention = partial(TrajectoryAttention, width, shape.heads, patches.num_slots)
    blocks = blocks_with(attention, shape, _DROP_PATH)
    head: nn.Module = nn.Linear(width, num_classes)
    if sampler is None:
        head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), head)
    body = SequenceBody(blocks, width, head)
    return PatchClassifier(geometry, patches, PatchEmbedding(geometry, width), body)
