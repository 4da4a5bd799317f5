"""What accelerators can do at best, from their makers' data sheets: floating-point rates and memory.

Rates are dense; data sheets print twice as much "with sparsity". Only whole products that are known by name
are here: of a slice of a GPU (MIG), an export variant or a CPU nothing is known, and no figure is better than
a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from everest_ds.units import GIB

TERA = 10**12


@dataclass(frozen=True)
class Device:
    """One product.

    Attributes:
        reported_as: pattern of the whole name that the driver reports (`torch.cuda.get_device_name`).
        memory_gib: as sold; the driver keeps 1 to 3 % of it. Makers write GB and mean GiB.
        tflops: peak rate in 10^12 floating-point operations a second, by dtype. `fp32` is without tensor
            cores and `tf32` with them; `fp16` and `bf16` accumulate in float32.
        source: where that is printed.
    """

    reported_as: str
    memory_gib: int
    tflops: Mapping[str, float]
    source: str

    @property
    def memory_bytes(self) -> int:
        """Memory as sold, bytes."""
        return self.memory_gib * GIB

    def peak_flops_per_s(self, dtype: str) -> float | None:
        """Peak rate in floating-point operations a second; None where the device has no fast `dtype`."""
        rate = self.tflops.get(dtype)
        return None if rate is None else rate * TERA


def _rates(fp32: float, tf32: float | None, half: float, *, has_bf16: bool = True) -> dict[str, float]:
    rates = {"fp32": fp32, "tf32": tf32, "fp16": half, "bf16": half if has_bf16 else None}
    return {dtype: rate for dtype, rate in rates.items() if rate is not None}


_V100_SXM, _V100_PCIE = _rates(15.7, None, 125, has_bf16=False), _rates(14, None, 112, has_bf16=False)
_A100 = _rates(19.5, 156, 312)
_V100_SHEET, _A100_SHEET = "NVIDIA V100 data sheet, January 2020", "NVIDIA A100 data sheet, June 2021"
_GA102, _HOPPER = "NVIDIA GA102 white paper 2.0, appendix", "NVIDIA H100 white paper 1.04, table 3"

# Short name -> product. Halves of figures with sparsity where the source prints only those.
DEVICES: dict[str, Device] = {
    "T4": Device(r"Tesla T4", 16, _rates(8.1, None, 65, has_bf16=False), "NVIDIA T4 data sheet"),
    "V100 SXM 16GB": Device(r"Tesla V100-SXM2-16GB", 16, _V100_SXM, _V100_SHEET),
    "V100 SXM 32GB": Device(r"Tesla V100-SXM2-32GB(-LS)?", 32, _V100_SXM, _V100_SHEET),
    "V100 PCIe 16GB": Device(r"Tesla V100-PCIE-16GB", 16, _V100_PCIE, _V100_SHEET),
    "V100 PCIe 32GB": Device(r"Tesla V100-PCIE-32GB", 32, _V100_PCIE, _V100_SHEET),
    "A10": Device(r"NVIDIA A10", 24, _rates(31.2, 62.5, 125), "NVIDIA A10 data sheet"),
    "A30": Device(r"NVIDIA A30", 24, _rates(10.3, 82, 165), "NVIDIA A30 data sheet"),
    "A40": Device(r"NVIDIA A40", 48, _rates(37.4, 74.8, 149.7), "NVIDIA A40 data sheet"),
    "A100 40GB": Device(r"(NVIDIA )?A100-(SXM4|PCIE)-40GB", 40, _A100, _A100_SHEET),
    "A100 80GB": Device(r"(NVIDIA )?A100(-SXM4-80GB| 80GB PCIe)", 80, _A100, _A100_SHEET),
    "A6000": Device(r"(NVIDIA )?RTX A6000", 48, _rates(38.7, 77.4, 154.8), _GA102),
    "RTX 3090": Device(r"(NVIDIA )?GeForce RTX 3090", 24, _rates(35.6, 35.6, 71), _GA102),
    "RTX 4090": Device(
        r"NVIDIA GeForce RTX 4090", 24, _rates(82.6, 82.6, 165.2), "NVIDIA Ada GPU white paper, appendix A"
    ),
    "RTX 6000 Ada": Device(
        r"NVIDIA RTX 6000 Ada Generation", 48, _rates(91.1, 182.1, 364.2), "NVIDIA Ada PROVIZ white paper 1.1"
    ),
    "L4": Device(r"NVIDIA L4", 24, _rates(30.3, 60, 121), "NVIDIA L4 data sheet (halved)"),
    "L40": Device(r"NVIDIA L40", 48, _rates(90.5, 90.5, 181.05), "NVIDIA L40 data sheet"),
    "L40S": Device(r"NVIDIA L40S", 48, _rates(91.6, 183, 362.05), "NVIDIA L40S data sheet"),
    "H100 SXM": Device(r"NVIDIA H100 80GB HBM3", 80, _rates(66.9, 494.7, 989.4), _HOPPER),
    "H100 PCIe": Device(r"NVIDIA H100 PCIe", 80, _rates(51.2, 378, 756), _HOPPER),
    "H100 NVL": Device(r"NVIDIA H100 NVL", 94, _rates(60, 417.5, 835.5), "NVIDIA H100 data sheet (halved)"),
    "H200 SXM": Device(r"NVIDIA H200", 141, _rates(67, 494.5, 989.5), "NVIDIA H200 data sheet (halved)"),
    "H200 NVL": Device(r"NVIDIA H200 NVL", 141, _rates(60, 417.5, 835.5), "NVIDIA H200 data sheet (halved)"),
    # its fp32 rate is 75 or 80 by NVIDIA's own documents
    "B200": Device(
        r"NVIDIA B200", 180, {"tf32": 1100, "fp16": 2250, "bf16": 2250}, "NVIDIA Blackwell architecture brief"
    ),
}


def find_device(reported_name: str) -> Device | None:
    """The product that reports itself by this name; None if it is not known."""
    return next((d for d in DEVICES.values() if re.fullmatch(d.reported_as, reported_name)), None)


def peak_flops_per_s(reported_name: str, dtype: str) -> float | None:
    """Peak dense rate of a device in `fp32`, `tf32`, `fp16` or `bf16`; None if unknown, never a guess."""
    device = find_device(reported_name)
    return None if device is None else device.peak_flops_per_s(dtype)


def memory_bytes(reported_name: str) -> int | None:
    """Memory of a device as sold; None if unknown."""
    device = find_device(reported_name)
    return None if device is None else device.memory_bytes
