"""Tests of device description files: valid ones are read, and errors name the file and the key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from everest_ds.costs.hardware.gpus import DEVICES, device_of
from everest_ds.errors import UsageError

NUMBERS = {
    "memory_gib": 64,
    "tflops": {"fp32": 40, "bf16": 300.5},
    "memory_gb_per_s": 2000,
    "link": "pcie5",
    "host_link": "pcie5",
    "watts": 500,
}


@pytest.mark.parametrize("name", ["my_gpu.yaml", "my_gpu.json"])
def test_a_device_is_what_its_file_says(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(json.dumps(NUMBERS))
    short, device = device_of(str(tmp_path / name))
    assert short == "my_gpu" and device.memory_gib == 64 and device.matmul_share is None
    assert device.peak_flops_per_s("bf16") == 300.5e12 and device.peak_flops_per_s("fp16") is None


def test_other_names_are_products() -> None:
    assert device_of("l40s") == ("L40S", DEVICES["L40S"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wats": 1}, "unknown key `wats`; allowed: did you mean watts"),
        ({"watts": None}, "watts; given: None; allowed: a number above 0"),
        ({"memory_gib": -1}, "memory_gib; given: -1"),
        ({"memory_gb_per_s": "2 TB"}, "memory_gb_per_s; given: '2 TB'"),
        ({"link": "nvlink9"}, "link; given: nvlink9; allowed: did you mean nvlink"),
        ({"tflops": {"fp8": 1}}, "a peak rate by dtype: fp32, tf32, fp16, bf16"),
        ({"tflops": {"bf16": True}}, "bf16; given: True"),
        ({"tflops": None}, "tflops; allowed: a peak rate by dtype"),
    ],
)
def test_a_wrong_number_is_named(tmp_path: Path, change: dict[str, object], said: str) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text(json.dumps({**NUMBERS, **change}))
    with pytest.raises(UsageError) as caught:
        device_of(str(file))
    assert str(file) in str(caught.value) and said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "does not describe a device"),
        ("- 1", "does not describe a device"),
        ("{", "not readable"),
        ("{watts: 5}", "missing keys: memory_gib"),
    ],
)
def test_a_file_that_is_no_device_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "gpu.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        device_of(str(file))
    with pytest.raises(UsageError, match="not readable"):
        device_of(str(tmp_path / "missing.yaml"))
