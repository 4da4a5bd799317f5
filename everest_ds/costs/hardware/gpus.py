"""Accelerator specifications from the vendors' data sheets: peak rates, memory, links and power.

Rates are dense; data sheets print twice as much "with sparsity". The table lists complete products that are
identified by name. Slices of a GPU (MIG), export variants and CPUs are left out, because a missing figure is
better than a wrong one. `matmul_share` is not on any data sheet: it comes from the table "Maximum Achievable
Matmul FLOPS" of stas00/ml-engineering (bf16).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from everest_ds.costs.hardware.links import LINKS
from everest_ds.errors import UsageError, nearest
from everest_ds.units import GIB

_EXAMPLE = (
    "memory_gib: 64, tflops: {fp32: 40, bf16: 300}, memory_gb_per_s: 2000, link: pcie5, host_link: pcie5,"
    " watts: 500"
)
_OPTIONAL = {"matmul_share": None, "source": "your file", "reported_as": "(?!)"}

TERA = 10**12


@dataclass(frozen=True)
class Device:
    """The specification of one accelerator product.

    Attributes:
        reported_as: regular expression for the full name that the driver reports
            (`torch.cuda.get_device_name`).
        memory_gib: memory as sold, of which the driver reserves 1 to 3 %. Vendors write GB and mean GiB.
        tflops: peak rate in 10^12 floating-point operations per second, by dtype. `fp32` is without tensor
            cores and `tf32` with them; `fp16` and `bf16` accumulate in float32.
        source: the document that prints `tflops` and the figures below.
        memory_gb_per_s: bandwidth of the memory.
        link: link between the GPUs of a node, a key of `links.LINKS`. NVLink bridges join only two cards and
            are not considered.
        host_link: link to the host, a key of `links.LINKS`.
        watts: maximum power draw.
        matmul_share: measured share of the peak half-precision rate for the best of many matrix shapes; None
            if no published measurement is known.
    """

    reported_as: str
    memory_gib: int
    tflops: Mapping[str, float]
    source: str
    memory_gb_per_s: float
    link: str
    host_link: str
    watts: int
    matmul_share: float | None = None

    @property
    def memory_bytes(self) -> int:
        """Memory of the device as sold, in bytes."""
        return self.memory_gib * GIB

    def peak_flops_per_s(self, dtype: str) -> float | None:
        """Return the peak rate for `dtype`, in floating-point operations per second; None if unlisted."""
        rate = self.tflops.get(dtype)
        return None if rate is None else rate * TERA


def _rates(fp32: float, tf32: float | None, half: float, *, has_bf16: bool = True) -> dict[str, float]:
    """Return peak rates by dtype, without the dtypes that a device does not support."""
    rates = {"fp32": fp32, "tf32": tf32, "fp16": half, "bf16": half if has_bf16 else None}
    return {dtype: rate for dtype, rate in rates.items() if rate is not None}


_V100_SXM, _V100_PCIE = _rates(15.7, None, 125, has_bf16=False), _rates(14, None, 112, has_bf16=False)
_A100 = _rates(19.5, 156, 312)
_V100_SHEET, _A100_SHEET = "NVIDIA V100 data sheet, January 2020", "NVIDIA A100 data sheet, June 2021"
_GA102, _HOPPER = "NVIDIA GA102 white paper 2.0, appendix", "NVIDIA H100 white paper 1.04, table 3"
_H200, _MI300X = "NVIDIA H200 data sheet (halved)", "AMD Instinct MI300X data sheet, 2023"
# Links between GPUs and to the host, for cards without NVLink.
_PCIE3, _PCIE4, _PCIE5 = ("pcie3", "pcie3"), ("pcie4", "pcie4"), ("pcie5", "pcie5")
# Short name -> product. If a name matches several products with equal memory, the first one is used. Rates
# are halved where the source prints only figures with sparsity.
DEVICES: dict[str, Device] = {
    "T4": Device(
        r"Tesla T4", 16, _rates(8.1, None, 65, has_bf16=False), "NVIDIA T4 data sheet", 300, *_PCIE3, 70
    ),
    "V100 SXM 16GB": Device(
        r"Tesla V100-SXM2-16GB", 16, _V100_SXM, _V100_SHEET, 900, "nvlink2", "pcie3", 300
    ),
    "V100 SXM 32GB": Device(
        r"Tesla V100-SXM2-32GB(-LS)?", 32, _V100_SXM, _V100_SHEET, 900, "nvlink2", "pcie3", 300
    ),
    "V100 PCIe 16GB": Device(r"Tesla V100-PCIE-16GB", 16, _V100_PCIE, _V100_SHEET, 900, *_PCIE3, 250),
    "V100 PCIe 32GB": Device(r"Tesla V100-PCIE-32GB", 32, _V100_PCIE, _V100_SHEET, 900, *_PCIE3, 250),
    "A10": Device(r"NVIDIA A10", 24, _rates(31.2, 62.5, 125), "NVIDIA A10 data sheet", 600, *_PCIE4, 150),
    "A30": Device(r"NVIDIA A30", 24, _rates(10.3, 82, 165), "NVIDIA A30 data sheet", 933, *_PCIE4, 165),
    "A40": Device(r"NVIDIA A40", 48, _rates(37.4, 74.8, 149.7), "NVIDIA A40 data sheet", 696, *_PCIE4, 300),
    "A100 40GB": Device(
        r"(NVIDIA )?A100-SXM4-40GB", 40, _A100, _A100_SHEET, 1555, "nvlink3", "pcie4", 400, 0.869
    ),
    "A100 80GB": Device(
        r"(NVIDIA )?A100-SXM4-80GB", 80, _A100, _A100_SHEET, 2039, "nvlink3", "pcie4", 400, 0.869
    ),
    "A100 PCIe 40GB": Device(r"(NVIDIA )?A100-PCIE-40GB", 40, _A100, _A100_SHEET, 1555, *_PCIE4, 250, 0.811),
    "A100 PCIe 80GB": Device(r"(NVIDIA )?A100 80GB PCIe", 80, _A100, _A100_SHEET, 1935, *_PCIE4, 300, 0.811),
    "A6000": Device(r"(NVIDIA )?RTX A6000", 48, _rates(38.7, 77.4, 154.8), _GA102, 768, *_PCIE4, 300),
    "RTX 3090": Device(r"(NVIDIA )?GeForce RTX 3090", 24, _rates(35.6, 35.6, 71), _GA102, 936, *_PCIE4, 350),
    "RTX 4090": Device(
        r"NVIDIA GeForce RTX 4090",
        24,
        _rates(82.6, 82.6, 165.2),
        "NVIDIA Ada GPU white paper, appendix A",
        1008,
        *_PCIE4,
        450,
    ),
    "RTX 6000 Ada": Device(
        r"NVIDIA RTX 6000 Ada Generation",
        48,
        _rates(91.1, 182.1, 364.2),
        "NVIDIA Ada PROVIZ white paper 1.1",
        960,
        *_PCIE4,
        300,
    ),
    "L4": Device(r"NVIDIA L4", 24, _rates(30.3, 60, 121), "NVIDIA L4 data sheet (halved)", 300, *_PCIE4, 72),
    "L40": Device(r"NVIDIA L40", 48, _rates(90.5, 90.5, 181.05), "NVIDIA L40 data sheet", 864, *_PCIE4, 300),
    "L40S": Device(
        r"NVIDIA L40S", 48, _rates(91.6, 183, 362.05), "NVIDIA L40S data sheet", 864, *_PCIE4, 350
    ),
    "H100 SXM": Device(
        r"NVIDIA H100 80GB HBM3",
        80,
        _rates(66.9, 494.7, 989.4),
        _HOPPER,
        3350,
        "nvlink4",
        "pcie5",
        700,
        0.803,
    ),
    "H100 PCIe": Device(r"NVIDIA H100 PCIe", 80, _rates(51.2, 378, 756), _HOPPER, 2000, *_PCIE5, 350),
    "H100 NVL": Device(
        r"NVIDIA H100 NVL",
        94,
        _rates(60, 417.5, 835.5),
        "NVIDIA H100 data sheet (halved)",
        3900,
        *_PCIE5,
        400,
    ),
    "H200 SXM": Device(r"NVIDIA H200", 141, _rates(67, 494.5, 989.5), _H200, 4800, "nvlink4", "pcie5", 700),
    "H200 NVL": Device(r"NVIDIA H200 NVL", 141, _rates(60, 417.5, 835.5), _H200, 4800, *_PCIE5, 600),
    # fp32 is left out: NVIDIA's documents disagree on it (75 or 80)
    "B200": Device(
        r"NVIDIA B200",
        180,
        {"tf32": 1100, "fp16": 2250, "bf16": 2250},
        "NVIDIA Blackwell architecture brief",
        8000,
        "nvlink5",
        "pcie5",
        1000,
        0.776,
    ),
    "MI300X": Device(
        r"AMD Instinct MI300X",
        192,
        _rates(163.4, 653.7, 1307.4),
        _MI300X,
        5300,
        "infinity-fabric",
        "pcie5",
        750,
        0.601,
    ),
}
# Words that drivers and shops add to product names, ignored when a typed name is matched.
_VENDOR_WORDS = frozenset(("nvidia", "amd", "instinct", "tesla", "geforce", "rtx", "gpu"))


def find_device(reported_name: str) -> Device | None:
    """Return the device whose driver reports this name; None if it is unknown."""
    return next((d for d in DEVICES.values() if re.fullmatch(d.reported_as, reported_name)), None)


def find_product(name: str) -> str:
    """Return the short name of a product typed freely (`h100-80gb`, `rtx a6000`) or as the driver reports it.

    Raises:
        UsageError: no product matches (the nearest names are listed), or several products with different
            memory sizes do (they are listed).
    """
    typed = _words(name)
    called = [
        known
        for known, device in DEVICES.items()
        if re.fullmatch(device.reported_as, name)
        or (typed and typed <= _words(known) | {f"{device.memory_gib}gb"})
    ]
    if not called:
        fix = "use the vendor's product name, or a YAML file that describes the device"
        raise UsageError("unknown GPU", given=repr(name), allowed=nearest(name.upper(), DEVICES), fix=fix)
    if len({DEVICES[known].memory_gib for known in called}) > 1:
        raise UsageError(
            "the GPU's name matches several products", given=repr(name), allowed=", ".join(called)
        )
    return called[0]


def _words(name: str) -> frozenset[str]:
    """Split a product name into comparable words: `H100-SXM5-80GB` -> {h100, sxm, 80gb}."""
    spaced = re.sub(r"(sxm)\d|(pci)e\d?", lambda m: m[1] or "pcie", name.lower())
    joined = re.sub(r"(\d+) *(gb|gib)\b", r"\1gb", re.sub(r"\brtx(?=\w)", "", spaced))
    return frozenset(re.findall(r"[a-z0-9]+", joined)) - _VENDOR_WORDS


def peak_flops_per_s(reported_name: str, dtype: str) -> float | None:
    """Return the peak dense rate of a device in `fp32`, `tf32`, `fp16` or `bf16`; None if unknown."""
    device = find_device(reported_name)
    return None if device is None else device.peak_flops_per_s(dtype)


def memory_bytes(reported_name: str) -> int | None:
    """Return the memory of a device as sold, in bytes; None if unknown."""
    device = find_device(reported_name)
    return None if device is None else device.memory_bytes


def device_of(name: str) -> tuple[str, Device]:
    """Return the short name and the device for a product name or a device description file.

    Raises:
        UsageError: the name is neither a known product nor a readable device file, or the file has a key that
            is unknown, missing or out of range.
    """
    path = Path(name)
    if path.suffix in (".yaml", ".yml", ".json"):
        return path.stem, _read(path)
    product = find_product(name)
    return product, DEVICES[product]


def _read(path: Path) -> Device:
    try:
        tree = yaml.safe_load(path.read_text())  # JSON is a subset of YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: not readable as YAML", given=" ".join(str(error).split())) from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: the file does not describe a device", allowed=f"keys such as {_EXAMPLE}")
    _check_keys(tree, path)
    for key in ("memory_gib", "memory_gb_per_s", "watts", "matmul_share"):
        _check_number(tree, key, path)
    for key in ("link", "host_link"):
        if tree[key] not in LINKS:
            raise UsageError(
                f"{path}: invalid value of {key}", given=tree[key], allowed=nearest(str(tree[key]), LINKS)
            )
    _check_rates(tree["tflops"], path)
    return Device(**{**_OPTIONAL, **tree})


def _check_keys(tree: Mapping[str, Any], path: Path) -> None:
    known = [field.name for field in fields(Device)]
    for key in tree:
        if key not in known:
            raise UsageError(f"{path}: unknown key `{key}`", allowed=nearest(str(key), known))
    missing = [key for key in known if key not in tree and key not in _OPTIONAL]
    if missing:
        raise UsageError(f"{path}: missing keys: {', '.join(missing)}", fix=f"for example {_EXAMPLE}")


def _check_rates(rates: object, path: Path) -> None:
    dtypes = ("fp32", "tf32", "fp16", "bf16")
    if not isinstance(rates, dict) or not rates or not set(rates) <= set(dtypes):
        raise UsageError(
            f"{path}: invalid value of tflops",
            given=rates,
            allowed=f"a peak rate by dtype: {', '.join(dtypes)}",
        )
    for dtype in rates:
        _check_number(rates, dtype, path)


def _check_number(tree: Mapping[str, Any], key: str, path: Path) -> None:
    value = tree.get(key, 1)
    if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
        raise UsageError(f"{path}: invalid value of {key}", given=repr(value), allowed="a number above 0")
