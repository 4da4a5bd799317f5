"""Histograms of oriented gradients (HOG), the appearance targets of MME's decoder.

The method is that of Dalal and Triggs (CVPR 2005) without block normalisation, as MME uses it (Sun et al.,
"Masked Motion Encoding for Self-Supervised Video Representation Learning", CVPR 2023;
github.com/XinyuSun/MME, m3video/feat.py): Sobel gradients of each colour, unsigned orientation, every pixel's
magnitude shared linearly between the two nearest bins, and averages over cells of 8 x 8 pixels.

The implementation is economical: only the frame that a tubelet's target is taken from is processed, and votes
are added directly to the cells instead of to one map per bin (87 MB per clip in the released code). The Sobel
filters are sums of shifted maps, which counters of multiply-accumulates do not see; as convolutions over
every frame of a clip of 16 x 224 x 224 they would cost 0.043 GMACs.

Shape legend: B clips, F frames, H x W pixels, T slots, N tokens, G x G places per slot, S maps of H x W,
c pixels along a cell, b bins, C values of a target: colours x bins x cells of a patch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.tubelets import normalize_pixels

CELL_SIZE = 8
NUM_BINS = 9
NUM_COLOURS = 3


def hog_width(geometry: ClipGeometry) -> int:
    """Return C, the number of values in one token's target: 108 for patches of 16 pixels."""
    return NUM_COLOURS * NUM_BINS * (geometry.patch_size // CELL_SIZE) ** 2


@torch.no_grad()
def hog_targets(clip_BFHWC: Tensor, geometry: ClipGeometry) -> Tensor:
    """Return the histograms of every tubelet, computed on its middle frame.

    Args:
        clip_BFHWC: uint8 (B, F, H, W, 3). Gradients are those of the normalised pixels that the encoder gets.
        geometry: geometry of the clip; the patch size must be a multiple of the cell size.

    Returns:
        float32 (B, N, C), in (colour, bin, cell row, cell column) order.
    """
    middle = clip_BFHWC[:, geometry.tubelet_size // 2 :: geometry.tubelet_size]
    maps_SHW = rearrange(normalize_pixels(middle), "b t h w c -> (b t c) h w")
    cells = oriented_gradients(maps_SHW)
    along, colours = geometry.patch_size // CELL_SIZE, NUM_COLOURS
    pattern = "(b t c) (g i) (w j) o -> b (t g w) (c o i j)"
    return rearrange(cells, pattern, b=len(clip_BFHWC), c=colours, i=along, j=along)


def oriented_gradients(maps_SHW: Tensor) -> Tensor:
    """Return the histogram of gradient orientations per cell of single-colour maps: (S, H/c, W/c, b).

    Bin i is centred on the angle i·π/b, modulo π. A gradient exactly at a bin's centre votes for this bin
    only; the released code rounds up and down to find the two nearest bins and loses such votes.
    """
    dx, dy = _sobel(maps_SHW)
    bin_position = (torch.atan2(dy, dx) % math.pi) * (NUM_BINS / math.pi)
    lower = bin_position.floor()
    magnitude = _by_cell(torch.hypot(dx, dy))
    to_upper = magnitude * _by_cell(bin_position - lower)
    lower_bin = _by_cell(lower).long() % NUM_BINS  # rounding may reach π, which is bin 0 again
    votes = magnitude.new_zeros(*magnitude.shape[:-1], NUM_BINS)
    votes.scatter_add_(-1, lower_bin, magnitude - to_upper)
    votes.scatter_add_(-1, (lower_bin + 1) % NUM_BINS, to_upper)
    return votes / CELL_SIZE**2


def _sobel(maps_SHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return the horizontal and vertical Sobel gradients, (S, H, W) each, with replicated borders."""
    padded = F.pad(maps_SHW[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    smooth_down = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    smooth_right = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    return smooth_down[:, :, 2:] - smooth_down[:, :, :-2], smooth_right[:, 2:] - smooth_right[:, :-2]


def _by_cell(maps_SHW: Tensor) -> Tensor:
    """Group the pixels of each cell: (S, H, W) -> (S, H/c, W/c, c·c)."""
    return rearrange(maps_SHW, "s (h i) (w j) -> s h w (i j)", i=CELL_SIZE, j=CELL_SIZE)
