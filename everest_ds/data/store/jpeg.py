"""JPEG pictures, encoded and decoded by libjpeg-turbo (through simplejpeg).

A decoder of JPEG has to read a picture from its beginning, but can stop after any row of blocks, and can
leave out high frequencies, which gives a picture of a half, a quarter or an eighth of the size.
"""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from everest_ds.data.decoding.video import Size

_SUBSAMPLING = "420"  # like the videos that the pictures come from
_BLOCK_ROWS = 16  # rows of the smallest part of a picture that can be decoded, with this subsampling
_MARKER, _FRAME_HEADER = b"\xff", b"\xc0"  # the frame header of a baseline JPEG holds the number of rows
_ROWS_AT = 5  # offset of that number from the marker


def encode(picture: NDArray[np.uint8], quality: int) -> bytes:
    """Encode an RGB picture (H, W, 3) with `quality` from 1 to 100, as baseline JPEG."""
    data: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(picture), quality, "RGB", colorsubsampling=_SUBSAMPLING
    )
    return data


def decoded_size(size: Size, rows: int | None, reduction: int) -> tuple[int, int]:
    """Return the height and width of the picture that `decode` returns with these arguments."""
    return -(-min(_needed_rows(size, rows), size.height) // reduction), -(-size.width // reduction)


def decode(
    data: bytes,
    size: Size,
    rows: int | None = None,
    reduction: int = 1,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Decode at least the upper `rows` of an RGB picture that `encode` has encoded.

    Args:
        data: the encoded picture.
        size: size of the whole picture.
        rows: number of rows that are needed; None for all. They are the same as in the whole picture.
        reduction: one of `REDUCTIONS`: the picture is reduced by this factor, its sides are rounded up.
        out: contiguous array of the picture's shape to decode into; None for a new one.

    Returns:
        The picture (rows or more / reduction, W / reduction, 3).

    Raises:
        ValueError: if the data are not a JPEG picture.
    """
    needed = _needed_rows(size, rows)
    if needed < size.height:
        place = _place_of_rows(data)
        data = data[:place] + needed.to_bytes(2, "big") + data[place + 2 :]
    # The decoder takes the smallest scale at which the picture is as large as this.
    smallest = decoded_size(size, rows, reduction)
    picture: NDArray[np.uint8] = simplejpeg.decode_jpeg(
        data,
        "RGB",
        min_height=smallest[0],
        min_width=smallest[1],
        min_factor=reduction,
        buffer=out,
        strict=needed >= size.height,  # a cut picture ends before its data do, which is no error
    )
    return picture


def _needed_rows(size: Size, rows: int | None) -> int:
    """Return the number of rows to decode: whole blocks, and a row more, for the interpolation of chroma."""
    return size.height if rows is None else -(-(rows + 1) // _BLOCK_ROWS) * _BLOCK_ROWS


def _place_of_rows(data: bytes) -> int:
    """Return the place of the number of rows in an encoded picture."""
    place = 2  # the first marker has no content
    while data[place : place + 1] == _MARKER and data[place + 1 : place + 2] != _FRAME_HEADER:
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    if data[place : place + 1] != _MARKER:
        raise ValueError("not a baseline JPEG picture")
    return place + _ROWS_AT
