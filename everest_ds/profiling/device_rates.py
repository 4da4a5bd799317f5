"""Measured rates of this machine's device for the shapes of this project's models, for a calibration.

Call these functions on all ranks at the same time, because the ranks of a CPU share its caches and memory.
They cannot detect ranks that share cores, since the fastest call is the one that ran uninterrupted; the
caller has to account for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.config.backbones import MLP_RATIO
from everest_ds.costs import block
from everest_ds.costs.compute import FLOPS_PER_MAC
from everest_ds.models.attention import fused_attention
from everest_ds.models.linear import multiply
from everest_ds.models.matmul_precision import set_matmul_precision
from everest_ds.models.vit import Block
from everest_ds.profiling.launches import count_launches

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MIN_REPEATS, _MIN_SECONDS = 5, 0.04
_LAUNCHED_TOGETHER = 10  # calls per timing on a GPU, to hide the host's time for each launch
_HEAD_WIDTH = 64  # head width of ViT-S, ViT-B and ViT-L; ViT-H has 80
_LOGITS = 2**21  # attention logits per call: the heads of a few clips
_STEPPED_VALUES = 2**22
_COPIED_BYTES = 2**26
_CACHE_BYTES = 2**26  # exceeds the size of the caches


class Rate(NamedTuple):
    """The rate that is attained at one size.

    Attributes:
        shape: rows, inputs and outputs of a linear map; tokens of attention; or bytes of a tensor.
        rate: floating-point operations per second, two per multiply-accumulate; or bytes per second.
    """

    shape: tuple[int, ...]
    rate: float


def linear_rates(
    device: torch.device, precision: str, rows: Sequence[int], widths: Sequence[int]
) -> list[Rate]:
    """Measure the rate of a linear map's three products: forward, and backward for inputs and for weights.

    Args:
        device: the device to measure.
        precision: `fp32`, `tf32`, `bf16` or `fp16`.
        rows: numbers of tokens per micro-batch.
        widths: values of D; the map is from D to 4·D values.
    """
    set_matmul_precision(precision)
    return [_linear_rate(device, precision, n, width) for width in widths for n in rows]


def _linear_rate(device: torch.device, precision: str, rows: int, width: int) -> Rate:
    outputs = MLP_RATIO * width
    x, gradient = (_noise(size, device, precision) for size in ((rows, width), (rows, outputs)))
    size_bytes = width * outputs * DTYPES[precision].itemsize
    # As in a model, a weight has been evicted from the caches by the time it is used again.
    weights = cycle(
        [_noise((outputs, width), device, precision) for _ in range(-(-_CACHE_BYTES // size_bytes))]
    )

    def products() -> None:
        weight = next(weights)
        multiply(x, weight.t())
        multiply(gradient, weight)
        gradient.t() @ x

    flops = 3 * FLOPS_PER_MAC * rows * width * outputs
    return Rate((rows, width, outputs), flops / best_time(products, device))


def attention_rates(device: torch.device, precision: str, tokens: Sequence[int]) -> list[Rate]:
    """Measure the rate of fused attention, forward and backward: two products forward and five backward."""
    set_matmul_precision(precision)
    return [_attention_rate(device, precision, n) for n in tokens]


def _attention_rate(device: torch.device, precision: str, n: int) -> Rate:
    heads = 6
    clips = max(1, _LOGITS // (heads * n * n))
    qkv = _noise((clips, n, 3, heads, _HEAD_WIDTH), device, precision).requires_grad_()
    gradient = _noise((clips, n, heads * _HEAD_WIDTH), device, precision)
    seconds = best_time(lambda: torch.autograd.grad(fused_attention(qkv), qkv, gradient), device)
    products = sum(block.ATTENTION_PRODUCTS["fused"])
    return Rate((n,), products * FLOPS_PER_MAC * clips * heads * n * n * _HEAD_WIDTH / seconds)


def moving_rates(
    device: torch.device, precision: str, rows: Sequence[int], widths: Sequence[int]
) -> list[Rate]:
    """Measure the rate of a block's memory-bound operators in bytes per second, by the size of a tensor.

    These are norms, residual sums, GELU and its gradient, and sums over rows, in the forward and the backward
    pass, as often as costs/block.py counts them.
    """
    return [_moving_rate(device, precision, n, width) for width in widths for n in rows]


def _moving_rate(device: torch.device, precision: str, rows: int, width: int) -> Rate:
    x = _noise((rows, width), device, precision).requires_grad_()
    wide = _noise((rows, MLP_RATIO * width), device, precision)
    weight = torch.ones(width, device=device, dtype=DTYPES[precision])
    gradient = _noise((rows, width), device, precision)

    def passes() -> None:
        for _ in range(2):
            torch.autograd.grad(F.layer_norm(x, (width,), weight, weight), x, gradient)
            (x + gradient, x + gradient, gradient.sum(dim=0))
        F.gelu(wide)
        torch.ops.aten.gelu_backward(wide, wide)
        (wide.sum(dim=0), wide[:, : 3 * width].sum(dim=0))

    tensor_bytes = rows * width * x.element_size()
    num_passes = sum((*block.moves(block.OPERATORS), *block.moves(block.OPERATORS, split=True)))
    return Rate((tensor_bytes,), num_passes * tensor_bytes / best_time(passes, device))


def launch_seconds(device: torch.device) -> float:
    """Return the host's seconds per operator launch, measured on a block too small to load the device."""
    module = Block(_HEAD_WIDTH, 1).to(device)
    x = torch.zeros(1, 2, _HEAD_WIDTH, device=device)

    def both_ways() -> None:
        module(x).sum().backward()

    return best_time(both_ways, device) / count_launches(both_ways).total


def adam_values_per_s(device: torch.device) -> float:
    """Measure the parameters per second that torch's fused AdamW updates."""
    weight = torch.zeros(_STEPPED_VALUES, device=device, requires_grad=True)
    weight.grad = torch.full_like(weight, 1e-3)
    optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
    return _STEPPED_VALUES / best_time(optimizer.step, device)


def copy_bytes_per_s(device: torch.device) -> float:
    """Measure the rate of a copy within the device's memory, counting bytes read and bytes written."""
    source = torch.zeros(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / best_time(lambda: target.copy_(source), device)


def fresh_bytes_per_s(device: torch.device) -> float:
    """Measure the rate of the first write to newly allocated memory, in bytes per second."""
    count = _COPIED_BYTES // 4
    return _COPIED_BYTES / best_time(lambda: torch.empty(count, device=device).fill_(1.0), device)


def host_bytes_per_s(device: torch.device) -> float:
    """Measure the rate of a copy from pinned host memory to a GPU, in bytes per second."""
    source = torch.zeros(_COPIED_BYTES // 4, pin_memory=True)
    target = torch.empty(_COPIED_BYTES // 4, device=device)
    return _COPIED_BYTES / best_time(lambda: target.copy_(source, non_blocking=True), device)


def best_time(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several calls, which excludes interference by other processes."""
    together = _LAUNCHED_TOGETHER if device.type == "cuda" else 1
    call()
    wait(device)
    seconds: list[float] = []
    while len(seconds) < _MIN_REPEATS or sum(seconds) < _MIN_SECONDS:
        started = time.perf_counter()
        for _ in range(together):
            call()
        wait(device)
        seconds.append((time.perf_counter() - started) / together)
    return min(seconds)


def wait(device: torch.device) -> None:
    """Wait until the device has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _noise(size: tuple[int, ...], device: torch.device, precision: str) -> Tensor:
    return torch.randn(size, device=device).to(DTYPES[precision])
