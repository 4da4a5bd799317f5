"""Spatial crops of uint8 clips: choice of a box, then crop and resize. Colour is augmented on the device.

Clips are uint8 tensors (frame, row, column, colour); a box is (top, left, height, width) in pixels and the
same for all frames of a clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.data.decoding.video import REDUCTIONS, Motion, Need, Pictures

# VideoMAE's multi-scale crop: sides as fractions of the short side, height and width at most one scale apart.
MULTI_SCALES = (1.0, 0.875, 0.75, 0.66)
# The random resized crop of VideoMAE's fine-tuning: fraction of the area, and aspect ratio.
AREA_RANGE = (0.08, 1.0)
ASPECT_RANGE = (3 / 4, 4 / 3)


class Box(NamedTuple):
    """A rectangle within a frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def reduced(self, reduction: int) -> Box:
        """Return the box in pictures that were reduced by this factor, at least one pixel high and wide."""
        top, bottom = round(self.top / reduction), round((self.top + self.height) / reduction)
        left, right = round(self.left / reduction), round((self.left + self.width) / reduction)
        return Box(top, left, max(bottom - top, 1), max(right - left, 1))


def needed_by(boxes: Sequence[Box], size: int) -> Need:
    """Return the part of a picture that is needed to cut `boxes` out of it and resize them to `size`."""
    smallest = min(min(box.height, box.width) for box in boxes)
    reduction = next(factor for factor in REDUCTIONS if smallest >= factor * size or factor == 1)
    rows = range(min(box.top for box in boxes), max(box.top + box.height for box in boxes))
    columns = range(min(box.left for box in boxes), max(box.left + box.width for box in boxes))
    return Need(rows, columns, reduction)


def train_box(height: int, width: int, crop: str, rng: np.random.Generator) -> Box:
    """Return a random box for training, drawn by the method that `data.train_crop` names."""
    if crop == "multi_scale":
        return _multi_scale_box(height, width, rng)
    if crop == "random_resized":
        return _random_resized_box(height, width, rng)
    return view_box(height, width, 0, 1)


def view_box(height: int, width: int, view: int, num_views: int) -> Box:
    """Return square box `view` of `num_views` spread evenly along the longer side; one view is centred."""
    side = min(height, width)
    position = view / (num_views - 1) if num_views > 1 else 0.5
    return Box(round((height - side) * position), round((width - side) * position), side, side)


def crop_resize(clip: Tensor, box: Box, size: int, flip: bool = False, out: Tensor | None = None) -> Tensor:
    """Cut `box` out of every frame and resize it to (size, size), bilinear with antialiasing.

    Args:
        clip: uint8 (F, H, W, 3).
        box: the part of each frame.
        size: height and width of the result.
        flip: mirror the frames.
        out: contiguous uint8 (F, size, size, 3) to put the result into; None for a new tensor.

    Returns:
        `out`, or the new tensor.
    """
    cut = clip[:, box.top : box.top + box.height, box.left : box.left + box.width]
    if flip:
        cut = cut.flip(2)
    if out is None:
        out = cut.new_empty(len(cut), size, size, 3)
    if cut.shape == out.shape:
        return out.copy_(cut)
    # The colours of a pixel stay next to each other in memory, which is the fastest layout for uint8.
    # `F.interpolate` calls the same function, but always into new memory.
    frames, resized = cut.permute(0, 3, 1, 2), out.permute(0, 3, 1, 2)
    torch.ops.aten._upsample_bilinear2d_aa.out(frames, (size, size), False, None, None, out=resized)
    return out


def crop_pictures(
    pictures: Pictures, box: Box, size: int, flip: bool = False, out: Tensor | None = None
) -> Tensor:
    """Cut `box`, counted in the whole pictures, out of decoded pictures, as `crop_resize` does."""
    inner = box._replace(top=box.top - pictures.top, left=box.left - pictures.left)
    return crop_resize(pictures.pixels, inner.reduced(pictures.reduction), size, flip, out)


def crop_motion(motion: Motion, box: Box, geometry: ClipGeometry, flip: bool = False) -> Tensor:
    """Return how far each tubelet of a clip has moved since the slot before, in pixels of the clip.

    A cell of `motion` counts for a tubelet by the area that they share. A picture without vectors, as an
    intra-coded one, counts as still.

    Args:
        motion: the motion in the whole pictures of the clip.
        box: the part of the pictures that the clip shows.
        geometry: the grid of tubelets of the clip.
        flip: the clip is mirrored.

    Returns:
        float32 (T, G, G, 2), downwards and to the right; T slots of G x G places. The first slot takes the
        time between itself and the second.
    """
    grid, size = geometry.grid_size, geometry.image_size
    rows = _shares(motion.speed.shape[1], motion.cell, box.top - motion.top, box.height, grid)
    columns = _shares(motion.speed.shape[2], motion.cell, box.left - motion.left, box.width, grid)
    passed = np.diff(motion.number[:: geometry.tubelet_size])
    passed = np.concatenate([passed[:1], passed])[:, None, None, None]
    speed = motion.speed.reshape(-1, geometry.tubelet_size, *motion.speed.shape[1:]).mean(axis=1) * passed
    along_rows = columns @ speed.astype(np.float32)  # (T, r, c, 2) -> (T, r, G, 2)
    moved = (rows @ along_rows.reshape(*along_rows.shape[:2], -1)).reshape(-1, grid, grid, 2)
    moved *= np.array([size / box.height, size / box.width], np.float32)
    if flip:
        moved = moved[:, :, ::-1] * np.array([1, -1], np.float32)
    return torch.from_numpy(np.ascontiguousarray(moved))


def _shares(num_cells: int, cell: float, start: float, length: int, grid: int) -> NDArray[np.float32]:
    """Return the share (grid, cells) of each part of a side that each cell covers."""
    edges = (start + np.arange(grid + 1) * (length / grid))[:, None]
    cells = np.arange(num_cells + 1) * cell
    shared = np.minimum(edges[1:], cells[1:]) - np.maximum(edges[:-1], cells[:-1])
    return (np.maximum(shared, 0) * (grid / length)).astype(np.float32)


def _placed(height: int, width: int, box_height: int, box_width: int, rng: np.random.Generator) -> Box:
    top = int(rng.integers(height - box_height + 1))
    left = int(rng.integers(width - box_width + 1))
    return Box(top, left, box_height, box_width)


def _multi_scale_box(height: int, width: int, rng: np.random.Generator) -> Box:
    sides = [max(1, int(min(height, width) * scale)) for scale in MULTI_SCALES]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    return _placed(height, width, *pairs[rng.integers(len(pairs))], rng)


def _random_resized_box(height: int, width: int, rng: np.random.Generator) -> Box:
    for _ in range(10):  # ten attempts, then the centre, as in torchvision
        area = height * width * rng.uniform(*AREA_RANGE)
        aspect = math.exp(rng.uniform(math.log(ASPECT_RANGE[0]), math.log(ASPECT_RANGE[1])))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return _placed(height, width, h, w, rng)
    return view_box(height, width, 0, 1)
