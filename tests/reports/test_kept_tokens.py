"""Tests of pictures of kept tokens, against pixels counted by hand."""

from __future__ import annotations

import numpy as np

from everest_ds.reports.kept_tokens import dim_discarded, draw_kept

CLIP = np.random.default_rng(0).integers(50, 256, (4, 6, 8, 3), dtype=np.uint8)
KEPT = np.zeros((2, 3, 2), dtype=bool)
KEPT[1, 2, 0] = True  # slot 1, bottom row of tokens, left half: frames 2 and 3, rows 4 and 5, columns 0 to 3


def test_kept_pixels_stay_as_they_are_and_no_others() -> None:
    same = (dim_discarded(CLIP, KEPT) == CLIP).all(axis=-1)
    expected = np.zeros((4, 6, 8), dtype=bool)
    expected[2:, 4:, :4] = True
    assert (same == expected).all()


def test_one_column_a_slot_and_the_lit_tokens_below_the_frames() -> None:
    picture = draw_kept(CLIP, KEPT)
    assert picture.shape == (2 * (6 + 2), 2 * (8 + 2), 3)
    assert (picture[1:7, 11:19] == CLIP[2]).all()
    assert (picture[13:15, 11:15] == CLIP[2, 4:, :4]).all()
