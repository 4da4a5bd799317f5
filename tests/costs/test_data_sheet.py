"""Tests of machines from data sheets: no device exceeds its sheet."""

from __future__ import annotations

import pytest

from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.hardware.machine import Machine


@pytest.mark.parametrize("name", DEVICES)
def test_no_machine_is_better_than_its_sheet(name: str) -> None:
    device, machine = DEVICES[name], machine_from_sheet(name, DEVICES[name])
    assert 0.75 * device.memory_bytes < machine.memory_bytes < 0.95 * device.memory_bytes
    assert set(machine.precisions) == {"fp32", "tf32", "fp16", "bf16"} & set(device.tflops)
    for precision, curve in machine.products.items():
        peak = device.peak_flops_per_s(precision)
        assert peak is not None
        assert 0.55 * peak < curve.rates[-1] < peak  # the best published measurement
        assert list(curve.rates) == sorted(curve.rates)
        assert max(machine.attention[precision].rates) < peak
    assert Machine.from_json(machine.as_json()) == machine


def test_a_better_network_is_faster_and_the_usual_one_is_the_default() -> None:
    device = DEVICES["H100 SXM"]
    slow, usual = machine_from_sheet("x", device, "ethernet-10"), machine_from_sheet("x", device)
    assert slow.between.bytes_per_s < usual.between.bytes_per_s
    assert usual.between == machine_from_sheet("x", device, "8xib-ndr").between


def test_published_ceilings_are_met() -> None:
    """stas00/ml-engineering measured at most 794.5 TFLOP/s on an H100 and 271.2 TFLOP/s on an A100."""
    for name, best in (("H100 SXM", 794.5e12), ("A100 80GB", 271.2e12)):
        machine = machine_from_sheet(name, DEVICES[name])
        assert machine.products["bf16"].rates[-1] == pytest.approx(best, rel=0.01)
