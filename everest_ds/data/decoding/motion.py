"""Motion vectors of a video's pictures, as its encoder found them and FFmpeg exports them.

An encoder predicts blocks of a picture from other pictures of the stream; a vector says from where. FFmpeg
does not say which picture a vector points to, only whether that is shown earlier or later. It is taken to be
the nearest one in that direction that is decoded earlier and that other pictures refer to; encoders use
others too, but seldom. FFmpeg gives vectors of length 0 for blocks of MPEG-4's B pictures in direct mode.
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
_SHIFT = 4
_BLOCK = 1 << _SHIFT  # side of a macroblock in pixels, for which vectors are averaged
# FFmpeg's AVMotionVector.
_EXPORTED = np.dtype(
    [
        ("source", np.int32),
        *((name, np.uint8) for name in ("w", "h")),
        *((name, np.int16) for name in ("src_x", "src_y", "dst_x", "dst_y")),
        ("flags", np.uint64),
        *((name, np.int32) for name in ("motion_x", "motion_y")),
        ("motion_scale", np.uint16),
    ],
    align=True,
)


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

    exported: bytes
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
            self._vectors[number] = _Vectors(bytes(vectors), *distances)

    def take(self, numbers: Sequence[int], placement: Placement) -> Motion:
        """Return and forget the motion in the pictures `numbers`, which are shown as `placement` says."""
        rows, columns = -(-placement.height // _BLOCK), -(-placement.width // _BLOCK)
        pictures = [(index, self._vectors[n]) for index, n in enumerate(numbers) if n in self._vectors]
        speed = np.zeros((len(numbers), rows, columns, 2), np.float32)
        if pictures:
            index, found = zip(*pictures, strict=True)
            speed[list(index)] = _speeds(found, rows, columns)
        self._vectors.clear()
        return _shown(Motion(speed, np.array(numbers), _BLOCK), placement)


def export_vectors(stream: Any) -> None:
    """Make the decoder of a stream attach motion vectors to its frames; call before it decodes anything."""
    from av.codec.context import Flags2  # imported here because it is slow to import

    stream.codec_context.flags2 |= Flags2.export_mvs


def _speeds(pictures: Sequence[_Vectors], rows: int, columns: int) -> NDArray[np.float64]:
    """Return the mean speed of each cell (pictures, rows, columns, 2); its blocks count alike.

    FFmpeg gives vectors as the source minus the destination, in parts of a pixel.
    """
    vectors = np.frombuffer(b"".join(picture.exported for picture in pictures), _EXPORTED)
    lengths = [len(picture.exported) // _EXPORTED.itemsize for picture in pictures]
    picture = np.repeat(np.arange(len(pictures)), lengths)
    # A stream may hold more than it shows, beyond the last row and column.
    row = np.minimum(vectors["dst_y"] >> _SHIFT, rows - 1)
    column = np.minimum(vectors["dst_x"] >> _SHIFT, columns - 1)
    place = ((2 * picture + (vectors["source"] > 0)) * rows + row) * columns + column
    shape = (len(pictures), 2, rows, columns)
    count = np.bincount(place, minlength=np.prod(shape)).reshape(shape).sum(axis=1)
    moved = (np.bincount(place, vectors[axis], np.prod(shape)) for axis in ("motion_y", "motion_x"))
    scale = int(vectors["motion_scale"][0])
    unit = [[-1 / (scale * picture.before), 1 / (scale * picture.after)] for picture in pictures]
    total = [np.einsum("pd,pdrc->prc", unit, each.reshape(shape)) for each in moved]
    return np.stack(total, axis=-1) / np.maximum(count, 1)[..., None]


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
