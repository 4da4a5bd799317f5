"""The motion of the camera between the slots of a clip, and its removal from what ReRo compares.

A camera that pans changes every place of the picture, and ReRo then keeps what has contrast instead of what
moves. The dominant shift between two slots is the peak of their phase correlation (Kuglin and Hines, 1975).
It is used only if it explains the picture: if it lowers the median over the places of the mean difference
clearly. A moving object before a still background therefore leaves the comparison as it is.

Shape legend: B clips, F frames, T slots, t frames per slot, H x W pixels, L places per slot, N = T·L tokens,
P values of a tubelet, S = T - 1 pairs of neighbouring slots.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.tubelets import from_tubelets, to_tubelets

_GREEN = 1  # the colour that stands for brightness
# Share of the median difference that a shift may leave. Halfway between 1, for a shift that explains nothing,
# and the rest that the rounding to whole pixels leaves of one that explains everything.
_MOST_LEFT = 0.7
_LEAST = 1e-3  # share of a spectrum's largest value below which its values are rounding errors


def predecessors(tubelets_BNP: Tensor, geometry: ClipGeometry) -> Tensor:
    """Return what each tubelet of slots 1 .. T - 1 shows one slot earlier, as the camera has moved since.

    Content that was outside the picture then is replaced by the nearest pixel.

    Args:
        tubelets_BNP: uint8 tubelets, slot by slot.
        geometry: their grid, of at least two slots.

    Returns:
        uint8 (B, (T - 1)·L, P).
    """
    clip_BFHWC = from_tubelets(tubelets_BNP, geometry)
    slots_BTtHWC = clip_BFHWC.unflatten(1, (geometry.num_slots, geometry.tubelet_size))
    shift_BS2 = camera_shift(slots_BTtHWC[:, :, 0, :, :, _GREEN].float(), geometry.grid_size)
    before_BStHWC = _moved(slots_BTtHWC[:, :-1], shift_BS2)
    earlier = replace(geometry, num_frames=geometry.num_frames - geometry.tubelet_size)
    return to_tubelets(before_BStHWC.flatten(1, 2), earlier)


def camera_shift(brightness_BTHW: Tensor, grid: int) -> Tensor:
    """Estimate how far the picture as a whole moves from slot to slot.

    Args:
        brightness_BTHW: floating-point brightness of one picture per slot.
        grid: number of places along each side, whose differences are compared.

    Returns:
        int64 (B, T - 1, 2): whole pixels downwards and to the right; 0 where no shift explains the picture.
    """
    height, width = brightness_BTHW.shape[-2:]
    earlier, later = brightness_BTHW[:, :-1], brightness_BTHW[:, 1:]
    spectrum = torch.fft.rfft2(brightness_BTHW - brightness_BTHW.mean(dim=(2, 3), keepdim=True))
    cross = spectrum[:, 1:] * spectrum[:, :-1].conj()
    size = cross.abs()
    phase = cross / (size + _LEAST * size.amax(dim=(2, 3), keepdim=True) + torch.finfo(size.dtype).tiny)
    peak = torch.fft.irfft2(phase, s=(height, width)).flatten(2).argmax(dim=2)
    shift = torch.stack([_signed(peak // width, height), _signed(peak % width, width)], dim=-1)
    left = _median_difference(later, _moved(earlier[..., None, :, :, None], shift)[..., 0, :, :, 0], grid)
    explains = left < _MOST_LEFT * _median_difference(later, earlier, grid)
    return shift * explains[..., None]


def _signed(index: Tensor, side: int) -> Tensor:
    """Return the shift for a place in a periodic correlation: the second half of a side is negative."""
    return torch.where(index > side // 2, index - side, index)


def _moved(pictures: Tensor, shift_BS2: Tensor) -> Tensor:
    """Move pictures (B, S, t, H, W, C) by whole pixels; the edge fills what comes into view."""
    num_clips, num_slots, frames, height, width = pictures.shape[:5]

    def index(count: int, axis: int) -> Tensor:
        return torch.arange(count, device=pictures.device).view([-1 if a == axis else 1 for a in range(5)])

    down, right = shift_BS2[..., 0, None, None, None], shift_BS2[..., 1, None, None, None]
    row, column = (
        (index(height, 3) - down).clamp(0, height - 1),
        (index(width, 4) - right).clamp(0, width - 1),
    )
    return pictures[index(num_clips, 0), index(num_slots, 1), index(frames, 2), row, column]


def _median_difference(later_BSHW: Tensor, earlier_BSHW: Tensor, grid: int) -> Tensor:
    """Return the median over the places (B, S) of the mean absolute difference of two pictures."""
    side = later_BSHW.shape[-1] // grid
    return F.avg_pool2d((later_BSHW - earlier_BSHW).abs(), side).flatten(2).median(dim=2).values
