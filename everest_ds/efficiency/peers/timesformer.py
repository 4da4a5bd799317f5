"""TimeSformer: a video transformer with attention over time at each place, then over space in each frame.

Bertasius, Wang and Torresani, "Is Space-Time Attention All You Need for Video Understanding?", ICML 2021;
github.com/facebookresearch/TimeSformer (timesformer/models/vit.py). Divided attention computes two small
attention maps in place of one over all pairs of tokens, at the price of a second set of projections.

Shape legend: B clips, T slots (frames), S patches of a slot, n = 1 + T·S tokens, D width.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.kcenter import KCenterSampler
from everest_ds.efficiency.peers.layers import Drop, SelfAttention, drop_path_rates
from everest_ds.efficiency.peers.patches import AllPatches, PatchClassifier, PatchEmbedding, SequenceBody
from everest_ds.models.linear import Linear
from everest_ds.models.mlp import MLP
from everest_ds.models.vit import DROP_PATH_STREAM, LAYER_NORM_EPS

EIGHT_FRAMES = ClipGeometry(num_frames=8, tubelet_size=1)
_DROP_PATH = 0.1


class DividedBlock(nn.Module):
    """A pre-norm block with three residual branches: temporal attention, spatial attention, and MLP.

    Args:
        width: D.
        heads: number of attention heads.
        num_slots: T.
        drop_path: probability of dropping a residual branch.
        index: index of the block, from which its random streams are numbered.
    """

    def __init__(self, width: int, heads: int, num_slots: int, drop_path: float, index: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        norms = [nn.LayerNorm(width, eps=LAYER_NORM_EPS) for _ in range(3)]
        self.time_norm, self.space_norm, self.mlp_norm = norms
        self.time_attention = SelfAttention(width, heads)
        self.time_out = Linear(width, width)
        self.space_attention = SelfAttention(width, heads)
        self.mlp = MLP(width)
        self.drops = nn.ModuleList(Drop(drop_path, DROP_PATH_STREAM + 3 * index + i) for i in range(3))

    def forward(self, x_BnD: Tensor, key_B: Tensor) -> Tensor:
        """Run the block on tokens with the class token first: (B, n, D) -> (B, n, D)."""
        class_B1D, x_BTSD = x_BnD[:, :1], x_BnD[:, 1:].unflatten(1, (self.num_slots, -1))
        x_BTSD = x_BTSD + self.time_out(self.drops[0](self._over_time(x_BTSD), key_B))
        class_of_slots, patches = self._over_space(class_B1D, x_BTSD, key_B)
        x_BnD = torch.cat([class_B1D + class_of_slots, (x_BTSD + patches).flatten(1, 2)], dim=1)
        return x_BnD + self.drops[2](self.mlp(self.mlp_norm(x_BnD)), key_B)

    def _over_time(self, x_BTSD: Tensor) -> Tensor:
        along = rearrange(self.time_norm(x_BTSD), "b t s d -> (b s) t d")
        return rearrange(self.time_attention(along), "(b s) t d -> b t s d", b=len(x_BTSD))

    def _over_space(self, class_B1D: Tensor, x_BTSD: Tensor, key_B: Tensor) -> tuple[Tensor, Tensor]:
        """Attend within each slot plus a copy of the class token; return the copies' mean and the patches."""
        class_BT1D = class_B1D[:, None].expand(-1, self.num_slots, -1, -1)
        slots = torch.cat([class_BT1D, x_BTSD], dim=2).flatten(0, 1)
        mixed = self.space_attention(self.space_norm(slots)).unflatten(0, (-1, self.num_slots))
        mixed = self.drops[1](mixed, key_B)
        return mixed[:, :, 0].mean(dim=1, keepdim=True), mixed[:, :, 1:]


class DividedBlocks(nn.ModuleList):
    """A stack of `DividedBlock`s."""

    def forward(self, x_BnD: Tensor, key_B: Tensor) -> Tensor:
        """Run every block: (B, n, D) -> (B, n, D)."""
        for block in self:
            x_BnD = block(x_BnD, key_B)
        return x_BnD


def build_timesformer(
    geometry: ClipGeometry = EIGHT_FRAMES,
    shape: TransformerShape = BACKBONES["vit_base"].encoder,
    num_classes: int = 400,
    sampler: KCenterSampler | None = None,
) -> PatchClassifier:
    """Build TimeSformer, by default as published for 8 frames of K400.

    Args:
        geometry: geometry of the clip, with tubelets of one frame.
        shape: width, depth and heads.
        num_classes: number of classes.
        sampler: selects the patches; None uses all patches.
    """
    patches = sampler or AllPatches(geometry)
    rates = drop_path_rates(shape.depth, _DROP_PATH)
    blocks = [DividedBlock(shape.width, shape.heads, patches.num_slots, r, i) for i, r in enumerate(rates)]
    body = SequenceBody(DividedBlocks(blocks), shape.width, nn.Linear(shape.width, num_classes))
    model = PatchClassifier(geometry, patches, PatchEmbedding(geometry, shape.width), body)
    for block in blocks[1:]:  # starts with temporal attention off, as the image model it is fine-tuned from
        nn.init.zeros_(block.time_out.weight)
    return model
