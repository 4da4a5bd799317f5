"""Devices are known by the names that drivers report, each by one entry; nothing else has a peak rate."""

from __future__ import annotations

import re

import pytest

from everest_ds.profiling.devices import DEVICES, find_device, memory_bytes, peak_flops_per_s
from everest_ds.units import GIB

REPORTED = {
    "Tesla T4": "T4",
    "Tesla V100-SXM2-16GB": "V100 SXM 16GB",
    "Tesla V100-SXM2-32GB": "V100 SXM 32GB",
    "Tesla V100-PCIE-16GB": "V100 PCIe 16GB",
    "Tesla V100-PCIE-32GB": "V100 PCIe 32GB",
    "NVIDIA A10": "A10",
    "NVIDIA A30": "A30",
    "NVIDIA A40": "A40",
    "A100-SXM4-40GB": "A100 40GB",
    "NVIDIA A100-PCIE-40GB": "A100 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 80GB",
    "NVIDIA RTX A6000": "A6000",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    "NVIDIA L4": "L4",
    "NVIDIA L40": "L40",
    "NVIDIA L40S": "L40S",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA H100 PCIe": "H100 PCIe",
    "NVIDIA H100 NVL": "H100 NVL",
    "NVIDIA H200": "H200 SXM",
    "NVIDIA H200 NVL": "H200 NVL",
    "NVIDIA B200": "B200",
}


@pytest.mark.parametrize("reported", REPORTED)
def test_a_reported_name_finds_its_product_and_no_other(reported: str) -> None:
    matching = [name for name, device in DEVICES.items() if re.fullmatch(device.reported_as, reported)]
    assert matching == [REPORTED[reported]]
    assert find_device(reported) is DEVICES[REPORTED[reported]]


def test_every_product_is_reachable_by_a_reported_name() -> None:
    assert set(REPORTED.values()) == set(DEVICES)


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",  # a slice has a part of the rate
        "NVIDIA GH200 480GB",  # of which 96 are the GPU's
        "NVIDIA A800-SXM4-80GB",
        "NVIDIA H20",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "AMD EPYC",
        "",
    ],
)
def test_what_is_not_known_gets_no_figure(reported: str) -> None:
    assert find_device(reported) is None
    assert peak_flops_per_s(reported, "bf16") is None and memory_bytes(reported) is None


def test_a_dtype_that_a_device_has_no_fast_path_for_has_no_peak() -> None:
    assert peak_flops_per_s("Tesla V100-SXM2-32GB", "fp16") == 125e12
    assert peak_flops_per_s("Tesla V100-SXM2-32GB", "bf16") is None


def test_rates_are_dense_and_memory_is_in_bytes() -> None:
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(989.4e12)  # not 1979, sparse
    assert memory_bytes("NVIDIA A100-SXM4-80GB") == 80 * GIB
    assert all(device.source for device in DEVICES.values())
