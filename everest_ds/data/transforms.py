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
from torch import Tensor

from everest_ds.data.decoding.video import REDUCTIONS, Need, Pictures

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
