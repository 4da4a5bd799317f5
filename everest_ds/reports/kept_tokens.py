"""Which tokens of a clip are computed on, as pictures.

Shape legend: F frames, H x W pixels, C = 3 colours, T slots, h x w tokens of a slot.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from everest_ds.reports.tiles import Image, tile

_DIM = 0.2  # brightness of what is not kept

Kept = NDArray[np.bool_]


def draw_kept(clip_FHWC: Image, kept_Thw: Kept) -> Image:
    """Two rows, one column a slot: the first frame of each slot, and the same with only its kept tokens lit.

    Args:
        clip_FHWC: the frames that the model sees, F a multiple of T, H of h and W of w.

    Returns:
        uint8 (row, column, colour).
    """
    step = len(clip_FHWC) // len(kept_Thw)
    return tile(np.stack([clip_FHWC[::step], dim_discarded(clip_FHWC, kept_Thw)[::step]]))


def dim_discarded(clip_FHWC: Image, kept_Thw: Kept) -> Image:
    """The clip, frame by frame, with the pixels of discarded tokens darkened."""
    lit_FHW = spread(kept_Thw, clip_FHWC.shape[:3])
    return np.where(lit_FHW[..., None], clip_FHWC, np.rint(clip_FHWC * _DIM)).astype(np.uint8)


def spread(tokens_Thw: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """One value a token -> one a pixel of its tubelet, (F, H, W) = `shape`."""
    for axis, size in enumerate(shape):
        tokens_Thw = tokens_Thw.repeat(size // tokens_Thw.shape[axis], axis)
    return tokens_Thw
