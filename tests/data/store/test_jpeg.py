"""Tests of the JPEG pictures of a store, against whole pictures decoded by Pillow and simplejpeg."""

from __future__ import annotations

import io

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from everest_ds.data.decoding.video import REDUCTIONS, Size
from everest_ds.data.store import jpeg


def smooth_picture(height: int, width: int, seed: int) -> np.ndarray:
    grains = np.random.default_rng(seed).integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), np.uint8)
    return np.asarray(Image.fromarray(grains).resize((width, height), Image.Resampling.BICUBIC))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    share=st.floats(0.01, 1),
    reduction=st.sampled_from(REDUCTIONS),
    quality=st.integers(1, 100),
)
def test_the_decoded_part_equals_that_of_the_whole_picture(
    height: int, width: int, share: float, reduction: int, quality: int
) -> None:
    data = jpeg.encode(smooth_picture(height, width, seed=height * width), quality)
    rows = max(1, round(share * height))
    size = Size(width, height)
    whole = jpeg.decode(data, size, None, reduction)
    assert whole.shape == (-(-height // reduction), -(-width // reduction), 3)
    part = jpeg.decode(data, size, rows, reduction)
    needed = -(-rows // reduction)
    assert np.array_equal(part[:needed], whole[:needed])
    assert len(part) <= -(-(rows + 16) // reduction)  # at most one row of blocks more


def test_pictures_are_ordinary_jpeg_files() -> None:
    picture = smooth_picture(48, 64, seed=0)
    data, theirs = jpeg.encode(picture, 90), io.BytesIO()
    decoded = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(decoded - jpeg.decode(data, Size(64, 48))).max() <= 2  # Pillow has its own libjpeg-turbo
    assert np.array_equal(jpeg.decode(data, Size(64, 48)), simplejpeg.decode_jpeg(data))
    Image.fromarray(picture).save(theirs, "jpeg", quality=90, subsampling="4:2:0")
    their_error = np.abs(np.asarray(Image.open(theirs)).astype(int) - picture).mean()
    assert np.abs(decoded - picture).mean() < 1.05 * their_error


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"not a picture at all, but long enough to be one"])
def test_other_data_are_refused(data: bytes) -> None:
    for rows in (None, 8):
        with pytest.raises(ValueError):
            jpeg.decode(data, Size(64, 64), rows)
