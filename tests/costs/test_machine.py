"""Tests of rate curves, links and machines."""

from __future__ import annotations

import json
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.hardware.machine import Link, Machine, RateCurve, intensity

CURVE = RateCurve((10.0, 40.0, 640.0), (1e12, 4e12, 1e12))


def test_a_curve_is_straight_where_both_axes_are_logarithms() -> None:
    assert CURVE.at(20.0) == pytest.approx(2e12)  # half way on both axes
    assert CURVE.at(40.0) == pytest.approx(4e12)
    assert CURVE.at(160.0) == pytest.approx(sqrt(4e12 * 1e12))


@given(st.floats(1e-6, 1e9))
def test_a_curve_promises_nothing_that_was_not_measured(size: float) -> None:
    assert 1e12 * (1 - 1e-9) <= CURVE.at(size) <= 4e12 * (1 + 1e-9)
    assert CURVE.at(1.0) == 1e12 and CURVE.at(1e6) == 1e12


@pytest.mark.parametrize("sizes", [(), (2.0, 1.0), (1.0, 1.0)])
def test_points_must_ascend(sizes: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ascending"):
        RateCurve(sizes, tuple(1.0 for _ in sizes))


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096))
def test_intensity_is_products_over_values(m: int, n: int, k: int) -> None:
    assert intensity(m, n, k) == pytest.approx(m * n * k / (m * n + n * k + m * k))


def test_a_link_takes_latency_for_each_message_and_time_for_each_byte() -> None:
    assert Link(1e-3, 1e6).seconds(2e6, messages=3) == pytest.approx(2.003)


def test_a_machine_survives_its_file() -> None:
    machine = machine_from_sheet("H100", DEVICES["H100 SXM"])
    assert Machine.from_json(json.loads(json.dumps(machine.as_json()))) == machine
