"""Conversion of decoded frames to upright RGB pictures, whole or only the part that a clip's crops need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from everest_ds.data.decoding.orientation import (
    IDENTITY,
    Picture,
    Placement,
    axes_of,
    display_matrix,
    transform_of,
)
from everest_ds.data.decoding.video import Need, Size, shrunk

# In these formats, FFmpeg converts a part of a progressive frame to the same pixels as the whole frame, if
# the part is cut at multiples of these numbers of rows and columns, as found by the tests. Formats of more
# than 8 bits are dithered by position, and interlaced frames take their chroma from rows further away.
_PIXEL_LOCAL = frozenset({"yuv420p", "yuv422p", "yuv444p"})
_ROWS, _COLUMNS = 2, 16


class Cutout(NamedTuple):
    """A part of a picture: the rows and the columns in it."""

    rows: slice
    columns: slice


def part_with(need: Need, size: Size) -> Cutout:
    """Return the smallest part that contains what is needed of a picture and that may be converted alone."""
    return Cutout(_widened(need.rows, _ROWS, size.height), _widened(need.columns, _COLUMNS, size.width))


def _widened(needed: range, step: int, side: int) -> slice:
    return slice(needed.start // step * step, min(-(-needed.stop // step) * step, side))


class RgbConverter:
    """A converter of the frames of one video, which sets up FFmpeg's scaler once.

    Attributes:
        short_side: shrink larger pictures to this short side, in pixels.
    """

    def __init__(self, short_side: int | None) -> None:
        from av.video.reformatter import VideoReformatter  # imported here because it is slow to import

        self.short_side = short_side
        self._scaler: Any = VideoReformatter()
        self._matrix: tuple[int, ...] | None = None  # known from the first frame
        self._cut: Any = None  # the frame that parts are copied to

    def convert(self, frame: Any, part_of: Callable[[Size], Cutout] | None = None) -> Picture:
        """Convert a frame to RGB, and turn and mirror it as the file states.

        Args:
            frame: PyAV's frame.
            part_of: maps the size of the whole picture to the part of it that is returned; None for all.

        Raises:
            DataError: if the file states an angle that is not a multiple of 90 degrees.
        """
        stored = Size(frame.width, frame.height)
        matrix = self._matrix_of(frame)
        smaller = shrunk(stored, self.short_side)
        if part_of and smaller is None and matrix == IDENTITY and _is_pixel_local(frame):
            return self._rgb(self._copied(frame, part_of(stored)))
        picture = transform_of(matrix)(self._rgb(frame, smaller))
        return picture if part_of is None else picture[part_of(Size(picture.shape[1], picture.shape[0]))]

    def placement(self, frame: Any) -> Placement:
        """Return how a frame's picture is shown."""
        stored = Size(frame.width, frame.height)
        smaller = shrunk(stored, self.short_side) or stored
        axes = axes_of(self._matrix_of(frame))
        return Placement(stored.height, stored.width, axes, min(smaller) / min(stored))

    def _matrix_of(self, frame: Any) -> tuple[int, ...]:
        if self._matrix is None:
            self._matrix = display_matrix(frame)
        return self._matrix

    def _rgb(self, frame: Any, size: Size | None = None) -> Picture:
        width, height = size or (None, None)
        # One thread, because FFmpeg would otherwise start one per core.
        rgb = self._scaler.reformat(frame, width, height, "rgb24", threads=1)
        plane = rgb.planes[0]
        # Without a copy: the callers join pictures in new memory, or leave parts of them out.
        return np.ndarray((rgb.height, rgb.width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))

    def _copied(self, frame: Any, part: Cutout) -> Any:
        """Copy a part of a frame's planes to a frame of that size."""
        import av

        height, width = (side.stop - side.start for side in part)
        if self._cut is None or (self._cut.width, self._cut.height, self._cut.format.name) != (
            (width, height, frame.format.name)
        ):
            self._cut = av.VideoFrame(width, height, frame.format.name)
        self._cut.colorspace, self._cut.color_range = frame.colorspace, frame.color_range
        for source, target in zip(frame.planes, self._cut.planes, strict=True):
            rows, columns = frame.height // source.height, frame.width // source.width
            top, left = part.rows.start // rows, part.columns.start // columns
            inner = slice(top, top + target.height), slice(left, left + target.width)
            _values(target)[:] = _values(source)[inner]
        return self._cut


def _is_pixel_local(frame: Any) -> bool:
    """Return whether each pixel's RGB values follow from the luma and chroma at its place alone."""
    if frame.interlaced_frame or frame.format.name not in _PIXEL_LOCAL or frame.width % 2 or frame.height % 2:
        return False
    return all(plane.line_size > 0 for plane in frame.planes)


def _values(plane: Any) -> Picture:
    """Return a view of a plane's values, without the padding of its rows."""
    padded = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    return padded[:, : plane.width]
