"""Tests of a profile's memory tables."""

from __future__ import annotations

import pytest

from everest_ds.config import load_experiment
from everest_ds.profiling.memory_tables import over_time, trace_experiment


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_table_over_time_keeps_the_peak_of_the_step(precision: str) -> None:
    config = load_experiment("demo_pretrain", [f"precision={precision}"])
    traced = trace_experiment(config, lambda model: None)
    table = over_time(traced)
    assert 100 <= len(table) <= 240 < len(traced.timeline)
    totals = [sum(value for value in row.values() if isinstance(value, int)) for row in table]
    assert max(totals) == traced.peak_bytes
    assert table[0]["phase"] == "forward"
