"""Grids of frames in one picture.

Shape legend: R rows, T columns, H x W pixels, C = 3 colours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GAP = 1  # white pixels around each frame

Image = NDArray[np.uint8]


def tile(frames_RTHWC: Image) -> Image:
    """Arrange rows of frames in one uint8 picture (row, column, colour), with a white border around each."""
    gap = ((0, 0), (0, 0), (_GAP, _GAP), (_GAP, _GAP), (0, 0))
    framed = np.pad(frames_RTHWC, gap, constant_values=255)
    rows, columns, height, width, colours = framed.shape
    return framed.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, colours)
