"""The orientation of a video: how its pictures are turned and mirrored before they are shown.

A container may hold a display matrix; phones write one that turns, front cameras one that mirrors. The rules
are those of FFmpeg's autorotation (`configure_input_video_filter` and `av_display_rotation_get`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from everest_ds.errors import DataError

Picture = NDArray[np.uint8]  # (H, W, 3), RGB
Transform = Callable[[Picture], Picture]
IDENTITY = (1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)


class Axes(NamedTuple):
    """How the axes of a shown picture lie in the stored one.

    Attributes:
        swapped: True if rows of the shown picture are columns of the stored one.
        rows_reversed: True if, after that, the order of the rows is reversed.
        columns_reversed: True if, after that, the order of the columns is reversed.
    """

    swapped: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False


class Placement(NamedTuple):
    """How a stored picture is shown.

    Attributes:
        height, width: size of the stored picture, in pixels.
        axes: how it is turned and mirrored.
        scale: factor by which it is shrunk.
    """

    height: int
    width: int
    axes: Axes
    scale: float


def display_matrix(frame: Any) -> tuple[int, ...]:
    """Return the display matrix of a decoded frame of PyAV: 9 numbers, the first 6 in 16.16 fixed point."""
    stored = side_data(frame, "DISPLAYMATRIX")
    return IDENTITY if stored is None else tuple(np.frombuffer(bytes(stored), np.int32).tolist())


def side_data(frame: Any, kind: str) -> Any:
    """Return the side data of this kind of a decoded frame of PyAV, or None.

    `frame.side_data` would make the frame refer to its side data and these to the frame, which keeps the
    whole picture in memory until the next garbage collection.
    """
    from av.sidedata.sidedata import SideDataContainer  # imported here because it is slow to import

    wrap: Any = SideDataContainer
    return wrap(frame).get(kind)


@lru_cache
def transform_of(matrix: Sequence[int]) -> Transform:
    """Return the function that turns and mirrors a stored picture as `matrix` states.

    Raises:
        DataError: if the matrix turns pictures by an angle that is not a multiple of 90 degrees.
    """
    turn = _degrees(matrix)
    if turn == 90:
        transpose = matrix[3] > 0
        return lambda picture: picture.transpose(1, 0, 2) if transpose else np.rot90(picture, -1)
    if turn == 270:
        anti_transpose = matrix[3] < 0
        return lambda picture: np.rot90(picture, -1)[::-1] if anti_transpose else np.rot90(picture)
    if turn not in (0, 180):
        raise DataError(
            "the video asks to be shown at an angle",
            given=f"{turn} degrees",
            allowed="multiples of 90 degrees",
            fix="re-encode it upright: ffmpeg -i FILE -c:a copy NEW.mp4",
        )
    columns = slice(None, None, -1 if turn == 180 and matrix[0] < 0 else 1)
    rows = slice(None, None, -1 if matrix[4] < 0 else 1)
    return lambda picture: picture[rows, columns]


@lru_cache
def axes_of(matrix: Sequence[int]) -> Axes:
    """Return how `transform_of(matrix)` moves the axes of a picture.

    Raises:
        DataError: as `transform_of`.
    """
    corners = transform_of(matrix)(np.arange(4, dtype=np.uint8).reshape(2, 2, 1))[..., 0].tolist()
    (first, right), _ = corners
    row, column = divmod(first, 2)
    swapped = abs(right - first) == 2
    if swapped:
        row, column = column, row
    return Axes(swapped, row == 1, column == 1)


def _degrees(matrix: Sequence[int]) -> int:
    """Return the clockwise turn in whole degrees, 0..359."""
    widths = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    if 0 in widths:
        raise DataError("the video has a display matrix that maps its pictures to a line", given=matrix[:6])
    return round(math.degrees(math.atan2(matrix[1] / widths[1], matrix[0] / widths[0]))) % 360
