"""The `codec` score of ReRo: the change that motion vectors and a thumbnail of the clip predict.

A tubelet changes because its content moves, or because its brightness changes. The first is predicted from
the encoder's motion vectors and the texture of the tubelet: content with mean squared gradient g that moves
by d pixels changes by g·d² per pixel, and by twice its variance once it has moved away altogether. The second
is seen in a thumbnail, and covers what vectors do not: cuts, intra-coded pictures, light, new background.

Shape legend: F frames, H x W pixels, T slots, t frames per tubelet, G x G places of a slot, N = T·G·G tokens,
S samples of a tubelet, X features that are linear in the samples.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from everest_ds.config.selections import CODEC_SAMPLES
from everest_ds.config.tokens import ClipGeometry

_GREEN = 1  # the colour that stands for brightness


def codec_importance(clip_FHWC: Tensor, moved_TGG2: Tensor, geometry: ClipGeometry) -> Tensor:
    """Compute how much each token is expected to differ from its predecessor in time.

    Args:
        clip_FHWC: uint8 RGB clip.
        moved_TGG2: how far each tubelet has moved since the slot before, in pixels: downwards, to the right.
        geometry: grid of tubelets of the clip.

    Returns:
        float32 (N,), in levels. Slot 0 has no predecessor and takes the importance of slot 1.
    """
    places, step = geometry.tokens_per_slot, geometry.patch_size // CODEC_SAMPLES
    samples_NS = _samples(clip_FHWC, geometry, step)
    features = (each.to(clip_FHWC.device) for each in _features(geometry.tubelet_size))
    quarters_NX, down_NX, right_NX = (samples_NS @ each.T for each in features)
    moved_N2 = moved_TGG2.flatten(0, 2).square() / step**2
    shifted_N = _mean_square(down_NX) * moved_N2[:, 0] + _mean_square(right_NX) * moved_N2[:, 1]
    variance_N = (_mean_square(samples_NS) - _mean_square(quarters_NX)).clamp(min=0)
    shifted_N = torch.minimum(shifted_N, 2 * variance_N)[places:]
    change_N = (_mean_square(quarters_NX[places:] - quarters_NX[:-places]) + shifted_N).sqrt()
    return torch.cat([change_N[:places], change_N])


def _samples(clip_FHWC: Tensor, geometry: ClipGeometry, step: int) -> Tensor:
    """Return the samples (N, S) of each tubelet, in the middle of the parts that a patch is cut into."""
    samples = clip_FHWC[:, step // 2 :: step, step // 2 :: step, _GREEN].float()
    grid, frames = geometry.grid_size, geometry.tubelet_size
    samples = samples.view(-1, frames, grid, CODEC_SAMPLES, grid, CODEC_SAMPLES)
    return samples.permute(0, 2, 4, 1, 3, 5).reshape(geometry.num_tokens, -1)


@lru_cache
def _features(frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return maps (X, S) from samples to means of quarters, and to differences down and to the right."""
    half = torch.eye(CODEC_SAMPLES // 2).repeat_interleave(2, dim=1) / 2
    slope = torch.eye(CODEC_SAMPLES).diff(dim=0)
    same = torch.eye(CODEC_SAMPLES)
    of_picture = torch.kron(half, half), torch.kron(slope, same), torch.kron(same, slope)
    quarters, down, right = (torch.kron(torch.eye(frames), each) for each in of_picture)
    return quarters, down, right


def _mean_square(features_NX: Tensor) -> Tensor:
    return features_NX.square().mean(dim=1)
