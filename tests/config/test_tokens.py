"""Tests of the token arithmetic: exact truncation, and the tubelet grid of a clip."""

from __future__ import annotations

from decimal import ROUND_FLOOR, Decimal

from hypothesis import given
from hypothesis import strategies as st

from everest_ds.config.tokens import ClipGeometry, exact_floor


@given(hundredths=st.integers(0, 100_000), count=st.integers(0, 10**9))
def test_exact_floor_is_decimal_arithmetic_on_the_written_ratio(hundredths: int, count: int) -> None:
    written = Decimal(hundredths).scaleb(-5)
    exact = int((written * count).to_integral_value(ROUND_FLOOR))
    assert exact_floor(float(written), count) == exact


def test_exact_floor_where_binary_floating_point_is_one_short() -> None:
    assert int(0.29 * 100) == 28
    assert exact_floor(0.29, 100) == 29


def test_geometry_of_other_clips() -> None:
    geometry = ClipGeometry(num_frames=32, tubelet_size=4, image_size=96, patch_size=8)
    assert (geometry.num_slots, geometry.grid_size, geometry.tokens_per_slot) == (8, 12, 144)
    assert (geometry.num_tokens, geometry.tubelet_values) == (1152, 3 * 4 * 8 * 8)
