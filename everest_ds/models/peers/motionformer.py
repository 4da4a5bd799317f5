"""Motionformer: attention along trajectories, which follow what a patch shows from frame to frame.

Patrick et al., "Keeping Your Eye on the Ball: Trajectory Attention in Video Transformers", NeurIPS 2021;
github.com/facebookresearch/Motionformer (slowfast/models/vit_helper.py, configs/K400). Each patch looks for
itself in every frame, softmax within the frame; what it finds, one token a frame, is its trajectory. It
then attends over that. Projecting N trajectories of T tokens is half of all compute.

The released code attends over unprojected values and says that this is a typo kept for replication. Here
values are projected, as in the paper; the count is the same.

Shape legend: B clips, T slots, S patches of a slot, N = T·S patches, n = 1 + N tokens, D width, h heads,
d width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.linear import Linear
from everest_ds.models.peers.kcenter import KCenterSampler
from everest_ds.models.peers.layers import blocks_with
from everest_ds.models.peers.patches import AllPatches, PatchClassifier, PatchEmbedding, SequenceBody

DROP_PATH = 0.2


class TrajectoryAttention(nn.Module):
    """Each patch attends within every slot, then over the slots; the class token attends to all tokens.

    Args:
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
        """(B, n, D), class token first -> (B, n, D)."""
        q, k, v = rearrange(self.qkv(x_BnD), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        of_class = F.scaled_dot_product_attention(q[:, :, :1], k, v)
        of_class_B1D = rearrange(of_class, "b h n d -> b n (h d)")
        trajectories_BTND = self._trajectories(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:])
        return self.proj(torch.cat([of_class_B1D, self._along(trajectories_BTND)], dim=1))

    def _trajectories(self, q_BhNd: Tensor, k_BhNd: Tensor, v_BhNd: Tensor) -> Tensor:
        """What each of the N patches finds in each slot: (B, T, N, D)."""
        # slots take the place of heads, so that attention is within them and a fused kernel can do it
        k, v = (rearrange(x, "b h (t s) d -> b (h t) s d", t=self.num_slots) for x in (k_BhNd, v_BhNd))
        found = F.scaled_dot_product_attention(q_BhNd.repeat_interleave(self.num_slots, dim=1), k, v)
        return rearrange(found, "b (h t) n d -> b t n (h d)", h=self.heads)

    def _along(self, x_BTND: Tensor) -> Tensor:
        """Attention of each patch over its trajectory, asked by the token in its own slot: (B, N, D)."""
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
    """Motionformer as published for K400 (16 frames), unless told other.

    Args:
        geometry: of the clip.
        shape: width, depth and heads.
        num_classes: of the logits.
        sampler: chooses the patches; all of them by default. With one, the head is a single linear map, as
            K-centered sampling was released.
    """
    patches, width = sampler or AllPatches(geometry), shape.width
    blocks = blocks_with(lambda: TrajectoryAttention(width, shape.heads, patches.num_slots), shape, DROP_PATH)
    head: nn.Module = nn.Linear(width, num_classes)
    if sampler is None:
        head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), head)
    body = SequenceBody(blocks, width, head)
    return PatchClassifier(geometry, patches, PatchEmbedding(geometry, width), body)
