"""K-centered patch sampling: a choice of patches from a long clip that covers all its other patches well.

Park et al., "K-centered Patch Sampling for Efficient Video Recognition", ECCV 2022;
github.com/kami93/kcenter_video (kcenter_transformer/models/patch_sampler). Each patch is a point made of its
pixels and its position. Points are picked greedily: each pick is the point farthest from all earlier picks,
which gives a covering radius of at most twice the optimum (Gonzalez, 1985). A clip's 32 frames are divided
into 8 segments, and as many patches as one frame has are picked from each segment. The backbone treats a
segment as a frame, and so costs as much as for 8 frames. The cost of the sampler itself (3.8 GMACs for
distances, and 195 picks that must run one after the other) is included in no published figure.

The released options that keep whole frames ("hybrid") are left out; they do not change the compute.

Shape legend: B clips, N patches of a clip, T segments (slots of the backbone), S patches picked in each,
X = B·T searches, m = N / T candidates of a search, P values of a patch, V = P + 3 of a point, k picks.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.layers import SAMPLER_STREAM
from everest_ds.models.sampling import random_bits

LONG_CLIP = ClipGeometry(num_frames=32, tubelet_size=1)
HALF_RANGE = 127.5  # scales pixels to -1..1, the range that the scale of the positions assumes


class KCenterSampler(nn.Module):
    """A sampler that picks S = L patches, as many as one frame has, from each of T segments of a clip.

    The sampler passes no gradient. It has no weights, but is a module so that profilers report its cost apart
    from the backbone's.

    Args:
        geometry: geometry of the clip; its slots must divide evenly into the segments.
        num_segments: T.
        one_per_place: pick every place of the frame once per segment, in order, as required by backbones that
            mix patches at the same place over time; otherwise pick the farthest patch at any place.
    """

    def __init__(
        self, geometry: ClipGeometry = LONG_CLIP, num_segments: int = 8, one_per_place: bool = False
    ) -> None:
        super().__init__()
        if geometry.num_slots % num_segments:
            raise ValueError(f"{geometry.num_slots} slots do not fill {num_segments} segments evenly")
        self.num_slots = num_segments
        self.num_places = geometry.tokens_per_slot
        self.num_candidates = geometry.num_tokens // num_segments
        self.one_per_place = one_per_place
        self.register_buffer("positions", patch_positions(geometry), persistent=False)
        self.positions: Tensor

    @torch.no_grad()
    def forward(self, patches_BNP: Tensor, key_B: Tensor) -> Tensor:
        """Pick from uint8 patches (B, N, P); the keys (B,) determine the first pick of each segment.

        Returns:
            int64 (B, T, S), indices into the N patches, in order of place if `one_per_place`, else of index.
        """
        points_BNV = self._points(patches_BNP)
        points_XmV = points_BNV.unflatten(1, (self.num_slots, -1)).flatten(0, 1)
        first_X = (random_bits(key_B, SAMPLER_STREAM, self.num_slots) % self.num_candidates).flatten()
        candidate_m = torch.arange(self.num_candidates, device=key_B.device)
        place_m = candidate_m % self.num_places
        rival_m = place_m if self.one_per_place else candidate_m
        picks_Xk = farthest_points(points_XmV, first_X, self.num_places, rival_m)
        order = rival_m[picks_Xk].argsort(dim=1)
        picks_BTS = picks_Xk.gather(1, order).unflatten(0, (-1, self.num_slots))
        first_of_segment = torch.arange(self.num_slots, device=key_B.device)[:, None] * self.num_candidates
        return picks_BTS + first_of_segment

    def _points(self, patches_BNP: Tensor) -> Tensor:
        pixels = (patches_BNP.float() - HALF_RANGE) / HALF_RANGE
        return torch.cat([pixels, self.positions.float().expand(len(pixels), -1, -1)], dim=-1)


def patch_positions(geometry: ClipGeometry) -> Tensor:
    """Return the time, row and column of each patch on the scale of its pixels, float32 (N, 3).

    The range from first to last is 2·√p in time and a factor √2 less in space, where p is the patch size.
    """
    in_time, in_space = math.sqrt(geometry.patch_size), math.sqrt(geometry.patch_size / 2)
    time = torch.linspace(-in_time, in_time, geometry.num_slots)
    place = torch.linspace(-in_space, in_space, geometry.grid_size)
    return torch.stack(torch.meshgrid(time, place, place, indexing="ij"), dim=-1).flatten(0, 2)


def farthest_points(points_XmV: Tensor, first_X: Tensor, num_picks: int, rival_m: Tensor) -> Tensor:
    """Pick points by the greedy k-center algorithm: always the point farthest from its nearest earlier pick.

    Args:
        points_XmV: the m candidate points of each of X searches, floating point.
        first_X: the first pick of each search.
        num_picks: k.
        rival_m: group number of each point; a pick excludes its whole group from later picks. `arange(m)`
            excludes only the picked point itself.

    Returns:
        int64 (X, k), in the order of picking. Among equally distant points, the first is picked.
    """
    distance_Xmm = squared_distances(points_XmV)
    search_X = torch.arange(len(points_XmV), device=points_XmV.device)
    to_nearest_Xm = torch.full_like(distance_Xmm[:, 0], torch.inf)
    picks = [first_X]
    for _ in range(num_picks - 1):
        to_nearest_Xm = torch.minimum(to_nearest_Xm, distance_Xmm[search_X, picks[-1]])
        ruled_out_Xm = rival_m == rival_m[picks[-1]][:, None]
        # -1 is below all distances and remains the minimum, so an excluded point is never picked.
        to_nearest_Xm = to_nearest_Xm.masked_fill(ruled_out_Xm, -1.0)
        picks.append(to_nearest_Xm.argmax(dim=1))
    return torch.stack(picks, dim=1)


def squared_distances(points_XmV: Tensor) -> Tensor:
    """Return all pairwise squared distances by one matrix product: (X, m, V) -> (X, m, m), clamped at 0."""
    length_Xm = points_XmV.square().sum(dim=-1)
    with _without_autocast(points_XmV.device):  # half precision cannot separate close points
        product_Xmm = points_XmV @ points_XmV.transpose(1, 2)
    return (length_Xm[:, :, None] + length_Xm[:, None] - 2 * product_Xmm).clamp(min=0)


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    available = torch.amp.is_autocast_available(device.type)  # false on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
