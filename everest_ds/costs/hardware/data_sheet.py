"""A machine from data sheets, for a cluster that has not been calibrated.

Peaks, bandwidths and links are the makers' (costs/hardware/gpus.py, links.py). The attained shares of these
figures are published measurements, taken on an A100 unless noted; the host's times are our own measurements:

- products: Calculon's A100 (systems/a100_80g.json) gives shares of the peak over the size of a product, here
  over the intensity of a cube of that size. The best share is scaled to the device's own `matmul_share`, and
  the sizes to its ratio of rate to bandwidth, because a faster device needs larger products.
- attention: FlashAttention-2 (2023), figures 4 and 7, head width 64, forward and backward. Below 512 tokens
  nothing is published; the share is assumed to fall with the number of tokens. Hopper runs the same kernels
  at 335 of 989 TFLOP/s.
- AdamW in host memory: ZeRO-Offload (2021), a billion parameters in a quarter of a second on a whole node.
- decoding: 31 ms for 64 frames of 320x240 (decord, one core of our development machine).
- the host: operators are counted (host_work.py). Their times, and Python's time per parameter tensor, were
  measured on one thread of an idle Xeon (Emerald Rapids) with tiny tensors, for which a CPU operator takes
  about as long as a launch: 15 + 17 + 8 ms for a step of ViT-L without DeepSpeed, 10 ms more in the backward
  pass at ZeRO-1 and 2, 94 + 97 + 28 ms at ZeRO-3. Other processors may take a third more or less.

A calibration replaces all of these numbers.
"""

from __future__ import annotations

from everest_ds.config.precision import VALUE_BYTES
from everest_ds.costs.hardware.gpus import Device
from everest_ds.costs.hardware.links import LINKS, LinkKind, find_interconnect
from everest_ds.costs.hardware.machine import Link, Machine, RateCurve, level, same_link
from everest_ds.units import GIB

# Calculon: GFLOP of a product -> share of the peak from that size on. The intensity is that of a cube with
# 10^9 x GFLOP / 2 multiply-accumulates.
_SHARES = {0.054: 0.1, 1.0: 0.6, 16.0: 0.9, 128.0: 0.95}
_SHARES_INTENSITY = tuple((gflop * 1e9 / 2) ** (1 / 3) / 3 for gflop in _SHARES)
_A100_BALANCE = 2 * 312e12 / 2039e9  # multiply-accumulates per value read at peak, bf16
_UNPUBLISHED_SHARE = 0.8  # for devices without a published `matmul_share`
_ATTENTION_SHARES = {128: 0.11, 256: 0.21, 512: 0.42, 1024: 0.52, 2048: 0.55}
_HOPPER_ATTENTION = 0.34 / 0.55
_STREAM_SHARE = 0.85  # attained share of memory bandwidth: BabelStream on A100 and H100
_ADAMW_BYTES = 28  # weight, gradient and moments read, all but the gradient written, float32
_HOST_ADAMW_PER_S = 4e9  # parameters per second of a whole node
_DECODE_S, _DECODE_PIXELS_PER_S, _CORES = 0.005, 1.9e8, 14  # cores per GPU: 112 for 8 in a DGX H100
_LAUNCH_S, _STEP_S = 2.5e-5, 5e-4  # per operator; per step, for the message by which hosts report failures
_PARAMETER_S = {0: 2e-5, 1: 4.5e-5, 2: 4.5e-5, 3: 4e-4}
# Memory not usable for tensors: 3 % kept by the driver, 3 % lost in gaps of the allocator, and the libraries
# (CUDA, NCCL and cuBLAS).
_USABLE_SHARE, _LIBRARIES_BYTES = 0.94, 3 * GIB // 2
RANKS_PER_NODE = 8
# Default links between nodes: those of the makers' own systems, otherwise one adapter per node.
_SYSTEMS = {
    "nvlink2": "4xib-edr",
    "nvlink3": "8xib-hdr",
    "nvlink4": "8xib-ndr",
    "nvlink5": "8xib-ndr",
    "infinity-fabric": "8xroce-400",
}
_OTHERS = "ib-hdr"


def usual_interconnect(device: Device) -> str:
    """Return the interconnect of systems sold with this device, in the notation of `find_interconnect`."""
    return _SYSTEMS.get(device.link, _OTHERS)


def machine_from_sheet(
    name: str, device: Device, interconnect: str | None = None, ranks_per_node: int = RANKS_PER_NODE
) -> Machine:
    """Return a machine with one rank per `device`, from its data sheet.

    Args:
        name: human-readable name of the device.
        device: its data sheet.
        interconnect: link between nodes; None for the usual link of this device.
        ranks_per_node: devices per node.

    Raises:
        UsageError: the interconnect is not known.
    """
    network = find_interconnect(interconnect or usual_interconnect(device))
    peaks = {p: peak for p in VALUE_BYTES if (peak := device.peak_flops_per_s(p)) is not None}
    bytes_per_s = _STREAM_SHARE * device.memory_gb_per_s * 1e9
    return Machine(
        device=name,
        memory_bytes=int(_USABLE_SHARE * device.memory_bytes) - _LIBRARIES_BYTES,
        asynchronous=True,
        peak_flops_per_s=peaks,
        products={p: _products(device, p, peak) for p, peak in peaks.items()},
        attention={p: _attention(device, peak) for p, peak in peaks.items()},
        moving=dict.fromkeys(peaks, level(bytes_per_s)),
        copy_bytes_per_s=bytes_per_s,
        fresh_bytes_per_s=bytes_per_s,
        adam_values_per_s=bytes_per_s / _ADAMW_BYTES,
        launch_s=_LAUNCH_S,
        step_s=_STEP_S,
        parameter_s=_PARAMETER_S,
        host_link=_link(LINKS[device.host_link]),
        host_adam_values_per_s=_HOST_ADAMW_PER_S / ranks_per_node,
        ranks_per_node=ranks_per_node,
        inside=same_link(_link(LINKS[device.link])),
        between=Link(network.kind.latency_s, network.bytes_per_s),
        decode_s=_DECODE_S,
        decode_pixels_per_s=_DECODE_PIXELS_PER_S,
        spare_cores=_CORES,
        watts=device.watts,
        source=f"data sheets ({device.source}) and published measurements; not calibrated",
    )


def _products(device: Device, precision: str, peak: float) -> RateCurve:
    best = device.matmul_share or _UNPUBLISHED_SHARE
    balance = peak * VALUE_BYTES[precision] / (device.memory_gb_per_s * 1e9)
    sizes = tuple(size * balance / _A100_BALANCE for size in _SHARES_INTENSITY)
    shares = tuple(best * share / max(_SHARES.values()) for share in _SHARES.values())
    return RateCurve(sizes, shares).scaled(peak)


def _attention(device: Device, peak: float) -> RateCurve:
    factor = _HOPPER_ATTENTION if device.link in ("nvlink4", "nvlink5") else 1.0
    shares = tuple(factor * share for share in _ATTENTION_SHARES.values())
    return RateCurve(tuple(map(float, _ATTENTION_SHARES)), shares).scaled(peak)


def _link(kind: LinkKind) -> Link:
    return Link(kind.latency_s, kind.bytes_per_s)
