"""Motion vectors of a video's pictures, as its encoder found them and FFmpeg exports them.

An encoder predicts blocks of a picture from other pictures of the stream; a vector says from where. FFmpeg
does not say which picture a vector points to, only whether that is shown earlier or later. It is taken to be
the nearest one in that direction that is decoded earlier and that other pictures refer to; encoders use
others too, but seldom. FFmpeg gives vectors of length 0 for blocks of MPEG-4's B pictures in direct mode.

Shape legend: F pictures, V vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from everest_ds.data.decoding.orientation import Placement, side_data
from everest_ds.data.decoding.video import Motion

# The decoders of FFmpeg that export motion vectors, found by encoding a moving picture with each encoder.
# Those of HEVC, VP8, VP9 and AV1 do not.
CODECS_WITH_VECTORS = frozenset(
    {"flv", "h263", "h264", "mpeg1video", "mpeg2video", "mpeg4", "msmpeg4", "msmpeg4v2", "wmv1", "wmv2"}
)
_BLOCK = 16  # side of a macroblock in pixels, for which vectors are averaged


class References:
    """The pictures of a stream that its vectors point to, guessed from the order of decoding.

    A picture that is shown before another one which is decoded earlier is taken for a B picture. No other
    picture refers to it, unless a picture that is shown before it is decoded after it.

    Args:
        order: for each picture, in the order in which they are shown, its place in the order of decoding.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order
        first_after = [*accumulate(reversed(order), min)][-2::-1] + [len(order)]
        last_before = [-1, *accumulate(order, max)]
        self._serves = [
            after > place or before > place
            for place, after, before in zip(order, first_after, last_before, strict=False)
        ]

    def distances(self, number: int) -> tuple[int, int]:
        """Return the distances from a picture to those that it refers to, before and after it."""
        before = (number - other for other in range(number - 1, -1, -1) if self._is_known(other, number))
        later = range(number + 1, len(self._order))
        after = (other - number for other in later if self._is_known(other, number))
        return next(before, 1), next(after, 1)

    def _is_known(self, other: int, number: int) -> bool:
        return self._serves[other] and self._order[other] < self._order[number]


class _Vectors(NamedTuple):
    """The vectors of a picture as FFmpeg exports them, and the distances of the pictures they point to."""

    exported: NDArray[Any]
    before: int
    after: int


class MotionReader:
    """A collector of the vectors of decoded pictures.

    Args:
        order: as in `References`; None if it is not known, and vectors are taken to point to neighbours.
    """

    def __init__(self, order: Sequence[int] | None) -> None:
        self._references = None if order is None else References(order)
        self._vectors: dict[int, _Vectors] = {}

    def note(self, number: int, frame: Any) -> None:
        """Keep the vectors of picture `number`, PyAV's `frame`."""
        vectors = side_data(frame, "MOTION_VECTORS")
        if vectors is not None:
            distances = self._references.distances(number) if self._references else (1, 1)
            self._vectors[number] = _Vectors(vectors.to_ndarray(), *distances)

    def take(self, numbers: Sequence[int], placement: Placement) -> Motion:
        """Return and forget the motion in the pictures `numbers`, which are shown as `placement` says."""
        rows, columns = -(-placement.height // _BLOCK), -(-placement.width // _BLOCK)
        pictures = [(index, self._vectors[n]) for index, n in enumerate(numbers) if n in self._vectors]
        speed = np.zeros((len(numbers) * rows * columns, 2), np.float32)
        if pictures:
            places, weights, speeds = _joined(pictures, rows, columns)
            total = np.maximum(np.bincount(places, weights, len(speed)), 1)
            for axis, each in enumerate(speeds):
                speed[:, axis] = np.bincount(places, weights * each, len(speed)) / total
        self._vectors.clear()
        cells = speed.reshape(len(numbers), rows, columns, 2)
        return _shown(Motion(cells, np.array(numbers), _BLOCK), placement)


def export_vectors(stream: Any) -> None:
    """Make the decoder of a stream attach motion vectors to its frames; call before it decodes anything."""
    from av.codec.context import Flags2  # imported here because it is slow to import

    stream.codec_context.flags2 |= Flags2.export_mvs


def _joined(
    pictures: Sequence[tuple[int, _Vectors]], rows: int, columns: int
) -> tuple[NDArray[np.int32], NDArray[np.float32], tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Return the cells of the vectors of several pictures, the areas of their blocks, and their speeds.

    FFmpeg gives vectors as the source minus the destination, in parts of a pixel.
    """
    found = np.concatenate([vectors.exported for _, vectors in pictures])
    facts = np.array([(index, -vectors.before, vectors.after) for index, vectors in pictures], np.int32)
    picture, before, after = facts.repeat([len(vectors.exported) for _, vectors in pictures], axis=0).T
    # A stream may hold more than it shows, beyond the last row and column.
    row = np.minimum(found["dst_y"] // _BLOCK, rows - 1)
    column = np.minimum(found["dst_x"] // _BLOCK, columns - 1)
    area = np.multiply(found["w"], found["h"], dtype=np.float32)
    unit = np.float32(1) / (np.where(found["source"] < 0, before, after) * found["motion_scale"])
    speeds = (found["motion_y"] * unit).astype(np.float32), (found["motion_x"] * unit).astype(np.float32)
    return (picture * rows + row) * columns + column, area, speeds


def _shown(motion: Motion, placement: Placement) -> Motion:
    """Return the motion in pictures that are turned, mirrored and shrunk before they are shown."""
    speed, (height, width, axes, scale) = motion.speed, placement
    if axes.swapped:
        speed, height, width = speed.swapaxes(1, 2)[..., ::-1], width, height
    top = left = 0
    if axes.rows_reversed:
        speed, top = speed[:, ::-1] * np.array([-1, 1], np.float32), height - speed.shape[1] * _BLOCK
    if axes.columns_reversed:
        speed, left = speed[:, :, ::-1] * np.array([1, -1], np.float32), width - speed.shape[2] * _BLOCK
    if scale != 1:
        speed = speed * np.float32(scale)
    return Motion(speed, motion.number, _BLOCK * scale, top * scale, left * scale)
