"""RandAugment's operations on uint8 clips, on any device, applied equally to all frames of a clip.

The operations are PIL's, extended to clips: where PIL uses the histogram or mean of a picture, these use the
clip's, because frames of a still scene that were adjusted one by one would flicker and look like motion.
torchvision's operations are not used because its CUDA wheels do not load beside a CPU build of torch, and
kornia's are not because they require float input.

Shape legend: F frames, H x W pixels, 3 colours; clips are uint8 (F, H, W, 3). `strength` is 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# The arguments are a clip, a strength, and a sign that selects the direction (left or right, up or down).
Operation = Callable[[Tensor, float, int], Tensor]

FILL = (124, 116, 104)  # ImageNet's mean, for pixels from outside the picture
# The largest change by each operation, as in timm, whose RandAugment VideoMAE fine-tunes with.
_MAX_DEGREES, _MAX_SHEAR, _MAX_SHIFT, _MAX_GAIN, _MAX_ADDED, _MAX_BITS = 30.0, 0.3, 0.45, 0.9, 110, 4
_HISTOGRAMS = 64
_LUMA = (0.299, 0.587, 0.114)


def auto_contrast(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Stretch the values of each colour to 0..255."""
    low, high = (extreme.float() for extreme in torch.aminmax(clip.flatten(0, 2), dim=0))
    stretched = (clip.float() - low) * (255 / (high - low).clamp(min=1))
    return torch.where(high > low, stretched, clip.float()).clamp(0, 255).to(torch.uint8)


def equalize(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Equalise the histogram of each colour."""
    counts = histogram(clip)
    levels = torch.arange(256, device=clip.device)
    last = (levels * (counts > 0)).argmax(dim=1, keepdim=True)
    step = (counts.sum(dim=1, keepdim=True) - counts.gather(1, last)) // 255
    below = counts.cumsum(dim=1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table, levels).to(torch.uint8).flatten()[_places(clip)]


def invert(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Invert every value: the negative of the clip."""
    return 255 - clip


def posterize(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Keep only the upper bits of each value: four at strength 0, none at strength 1."""
    bits = _MAX_BITS - int(strength * _MAX_BITS)
    return clip & (255 >> (8 - bits) << (8 - bits))


def solarize(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Invert the values above a threshold, which falls as the strength grows."""
    return torch.where(clip.int() < 256 - int(strength * 256), clip, 255 - clip)


def solarize_add(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Brighten the values below 128."""
    brighter = (clip.int() + int(strength * _MAX_ADDED)).clamp(max=255).to(torch.uint8)
    return torch.where(clip < 128, brighter, clip)


def color(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Increase or reduce the colour saturation."""
    return _away_from(_gray(clip), clip, strength, sign)


def contrast(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Increase or reduce the contrast about the clip's mean grey."""
    return _away_from(_gray(clip).mean().round(), clip, strength, sign)


def brightness(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Brighten or darken the clip."""
    return _away_from(torch.zeros((), device=clip.device), clip, strength, sign)


def sharpness(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Sharpen each frame, or smooth it over the eight neighbours of a pixel; borders stay as they are."""
    frames = clip.permute(0, 3, 1, 2).float()
    inner = (F.avg_pool2d(frames, 3, stride=1) * 9 + 4 * frames[..., 1:-1, 1:-1]) / 13
    smooth = frames.clone()
    smooth[..., 1:-1, 1:-1] = inner.round()
    return _away_from(smooth.permute(0, 2, 3, 1), clip, strength, sign)


def rotate(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Rotate the clip about its centre."""
    angle = math.radians(sign * strength * _MAX_DEGREES)
    cosine, sine = math.cos(angle), math.sin(angle)
    return _affine(clip, (cosine, sine, 0.0), (-sine, cosine, 0.0))


def shear_x(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Shear the clip horizontally, shifting rows against each other."""
    return _affine(clip, (1.0, sign * strength * _MAX_SHEAR, 0.0), (0.0, 1.0, 0.0))


def shear_y(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Shear the clip vertically, shifting columns against each other."""
    return _affine(clip, (1.0, 0.0, 0.0), (sign * strength * _MAX_SHEAR, 1.0, 0.0))


def translate_x(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Shift the clip to the left or right."""
    return _affine(clip, (1.0, 0.0, sign * strength * _MAX_SHIFT * clip.shape[2]), (0.0, 1.0, 0.0))


def translate_y(clip: Tensor, strength: float, sign: int) -> Tensor:
    """Shift the clip up or down."""
    return _affine(clip, (1.0, 0.0, 0.0), (0.0, 1.0, sign * strength * _MAX_SHIFT * clip.shape[1]))


OPERATIONS: tuple[Operation, ...] = (
    *(auto_contrast, equalize, invert, rotate, posterize, solarize, solarize_add, color, contrast),
    *(brightness, sharpness, shear_x, shear_y, translate_x, translate_y),
)


def histogram(clip: Tensor) -> Tensor:
    """Return the histogram of each colour: int64 (3, 256).

    The columns of the picture are spread over 64 histograms, which are summed at the end. With a single
    histogram, the pixels of a uniform picture would contend for one address on a GPU.
    """
    columns = torch.arange(clip.shape[2], device=clip.device) % _HISTOGRAMS * (3 * 256)
    index = (_places(clip) + columns[:, None]).flatten()
    one = torch.ones((), dtype=torch.int32, device=clip.device)
    counts = torch.zeros(_HISTOGRAMS * 3 * 256, dtype=torch.int32, device=clip.device)
    return counts.scatter_add_(0, index, one.expand_as(index)).view(_HISTOGRAMS, 3, 256).sum(dim=0)


def _places(clip: Tensor) -> Tensor:
    """Return the index of each value in a flat table (3, 256) of colours and values: int64 (F, H, W, 3)."""
    return clip.long() + torch.arange(0, 3 * 256, 256, device=clip.device)


def _gray(clip: Tensor) -> Tensor:
    values = clip.float()
    return sum(values[..., c : c + 1] * weight for c, weight in enumerate(_LUMA)).round()  # type: ignore[union-attr]


def _away_from(reference: Tensor, clip: Tensor, strength: float, sign: int) -> Tensor:
    factor = 1 + sign * strength * _MAX_GAIN
    return (reference + factor * (clip.float() - reference)).clamp(0, 255).to(torch.uint8)


def _affine(clip: Tensor, to_x: tuple[float, float, float], to_y: tuple[float, float, float]) -> Tensor:
    """Sample the clip bilinearly at (a·x + b·y + c, d·x + e·y + f), in pixels from its centre.

    The grid is computed on the device from Python numbers: to copy a matrix from the host would synchronise.
    """
    height, width = clip.shape[1:3]
    y = torch.arange(height, device=clip.device, dtype=torch.float32)[:, None] - (height - 1) / 2
    x = torch.arange(width, device=clip.device, dtype=torch.float32) - (width - 1) / 2
    columns, rows = (a * x + b * y + c for a, b, c in (to_x, to_y))
    grid = torch.stack([columns * (2 / width), rows * (2 / height)], dim=-1)
    fill = torch.cat([torch.full((1,), float(value), device=clip.device) for value in FILL]).view(1, 3, 1, 1)
    # grid_sample pads with zeros, so the fill colour is subtracted before and added after.
    frames = clip.permute(0, 3, 1, 2).float() - fill
    moved = F.grid_sample(frames, grid.expand(len(clip), -1, -1, -1), align_corners=False) + fill
    return moved.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
