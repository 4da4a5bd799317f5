"""Tests of the device table: each reported name matches one entry, and unknown names have no peak rate."""

from __future__ import annotations

import re

import pytest

from everest_ds.costs.hardware.gpus import (
    DEVICES,
    find_device,
    find_product,
    memory_bytes,
    peak_flops_per_s,
)
from everest_ds.costs.hardware.links import LINKS, find_interconnect
from everest_ds.errors import UsageError
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
    "NVIDIA A100-PCIE-40GB": "A100 PCIe 40GB",
    "NVIDIA A100-SXM4-80GB": "A100 80GB",
    "NVIDIA A100 80GB PCIe": "A100 PCIe 80GB",
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
    "AMD Instinct MI300X": "MI300X",
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
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",  # a slice has only a part of the rate
        "NVIDIA GH200 480GB",  # the GPU itself has 96 GB
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
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3", "bf16") == pytest.approx(
        989.4e12
    )  # 1979 is the rate with sparsity
    assert memory_bytes("NVIDIA A100-SXM4-80GB") == 80 * GIB
    assert all(device.source for device in DEVICES.values())


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("h100-80gb", "H100 SXM"),
        ("H100-PCIe", "H100 PCIe"),
        ("h200", "H200 SXM"),
        ("a100-80gb", "A100 80GB"),
        ("a100-pcie-40gb", "A100 PCIe 40GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("v100-sxm2-32gb", "V100 SXM 32GB"),
        ("rtx-a6000", "A6000"),
        ("rtx3090", "RTX 3090"),
        ("l40s", "L40S"),
        ("mi300x", "MI300X"),
    ],
)
def test_a_product_is_found_as_people_type_it(typed: str, meant: str) -> None:
    assert find_product(typed) == meant


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("a100", "A100 40GB, A100 80GB, A100 PCIe 40GB, A100 PCIe 80GB"),  # memory sizes differ
        ("h1000", "did you mean H100 SXM"),
        ("-", "one of A10"),
    ],
)
def test_other_names_are_refused_with_those_that_would_do(typed: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find_product(typed)


def test_every_product_names_links_that_are_known() -> None:
    named = {name for device in DEVICES.values() for name in (device.link, device.host_link)}
    assert named == set(LINKS)


def test_an_interconnect_is_a_kind_and_a_number_of_adapters() -> None:
    assert find_interconnect("8xib-ndr").bytes_per_s == pytest.approx(8 * 50e9 * 0.92)
    assert find_interconnect("ethernet-25").adapters == 1
    for wrong in ("ib-ndrr", "0xib-ndr", "xib-hdr"):
        with pytest.raises(UsageError, match="ib-"):
            find_interconnect(wrong)
