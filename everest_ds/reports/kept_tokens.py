"""Pictures of the kept tokens of a clip.

Shape legend: F frames, H x W pixels, C = 3 colours, T slots, h x w tokens per slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from everest_ds.reports.tiles import Image, tile

_DIM = 0.2  # relative brightness of discarded tokens

KeptMask = NDArray[np.bool_]


def draw_kept(clip_FHWC: Image, kept_Thw: KeptMask) -> Image:
    """Draw the first frame of each slot, and below it the same frame with its discarded tokens darkened.

    Args:
        clip_FHWC: the frames that the model sees; F is a multiple of T, H of h and W of w.
        kept_Thw: true for kept tokens.

    Returns:
        A uint8 picture (row, column, colour) with one column per slot.
    """
    step = len(clip_FHWC) // len(kept_Thw)
    return tile(np.stack([clip_FHWC[::step], dim_discarded(clip_FHWC, kept_Thw)[::step]]))


def dim_discarded(clip_FHWC: Image, kept_Thw: KeptMask) -> Image:
    """Return the clip with the pixels of discarded tokens darkened."""
    lit_FHW = spread(kept_Thw, clip_FHWC.shape[:3])
    return np.where(lit_FHW[..., None], clip_FHWC, np.rint(clip_FHWC * _DIM)).astype(np.uint8)


def spread(tokens_Thw: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Repeat each token's value over all pixels of its tubelet, giving an array of `shape` (F, H, W)."""
    for axis, size in enumerate(shape):
        tokens_Thw = tokens_Thw.repeat(size // tokens_Thw.shape[axis], axis)
    return tokens_Thw
