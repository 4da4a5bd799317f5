"""Upper limits of the device: matrix products and attention at our shapes, copies and launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from everest_ds.config.backbones import BACKBONES, MLP_RATIO
from everest_ds.models.attention import fused_attention
from everest_ds.profiling.device_rates import best_time, wait
from gpu_check.record import Record, Row

_BACKENDS = {
    "chosen": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_LAUNCHES, _READS = 2000, 50
_PIXELS = 16 * 224 * 224 * 3  # bytes per clip


class _Stack(NamedTuple):
    """A stack of blocks to measure, with its clips per micro-batch and tokens per clip."""

    backbone: str
    part: str
    clips: int
    tokens: int


# Pre-training keeps 156 of 1568 tokens in the encoder and predicts 314 more; fine-tuning keeps 940.
_STACKS = (
    _Stack("vit_large", "encoder", 64, 156),
    _Stack("vit_large", "decoder", 64, 470),
    _Stack("vit_large", "encoder", 32, 940),
    _Stack("vit_base", "encoder", 64, 156),
    _Stack("vit_huge", "encoder", 16, 940),
)
_TINY = (_Stack("vit_tiny", "encoder", 2, 16), _Stack("vit_tiny", "decoder", 2, 32))


def run(record: Record) -> None:
    """Measure all limits, starting with those of the device and the host."""
    device, tiny = record.session.device, record.session.tiny
    record.measure("device", partial(_device_limits, device, 128 if tiny else 8192))
    record.measure("host", partial(_host_limits, device, 2 if tiny else 64))
    for stack in _TINY if tiny else _STACKS:
        name = f"{stack.backbone} {stack.part}, {stack.clips} clips of {stack.tokens} tokens"
        record.measure(f"products, {name}", partial(_products, stack, device), needs_s=3)
        record.measure(f"attention, {name}", partial(_attention, stack, device), needs_s=3)


def _device_limits(device: torch.device, size: int) -> Row:
    """Measure square products in bf16, tf32 and fp32 (TFLOP/s), and a copy (TB/s read plus written)."""
    source = torch.empty(32 * size**2, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    row: Row = {"copy_tb_per_s": 2e-12 * len(source) / best_time(lambda: target.copy_(source), device)}
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    halves = a.bfloat16(), b.bfloat16()
    row["bf16_tflop_per_s"] = 2e-12 * size**3 / best_time(lambda: halves[0] @ halves[1], device)
    row["fp32_tflop_per_s"] = 2e-12 * size**3 / best_time(lambda: a @ b, device)
    torch.set_float32_matmul_precision("high")
    row["tf32_tflop_per_s"] = 2e-12 * size**3 / best_time(lambda: a @ b, device)
    torch.set_float32_matmul_precision("highest")
    return row


def _host_limits(device: torch.device, clips: int) -> Row:
    """Measure copies of a micro-batch to and from the host (GB/s), and a launch and a wait (microseconds)."""
    pageable = torch.empty(clips * _PIXELS, dtype=torch.uint8).random_()
    pinned = pageable.pin_memory() if device.type == "cuda" else pageable.clone()
    here = torch.empty_like(pageable, device=device)
    copies: dict[str, Callable[[], object]] = {
        "to_device_pinned": lambda: here.copy_(pinned, non_blocking=True),
        "to_device_pageable": lambda: here.copy_(pageable),
        "to_host_pinned": lambda: pinned.copy_(here, non_blocking=True),
        "to_host_fresh": lambda: here.to("cpu", copy=True),
    }
    row: Row = {
        f"{name}_gb_per_s": 1e-9 * len(here) / best_time(call, device) for name, call in copies.items()
    }
    return row | _launches(device)


def _launches(device: torch.device) -> Row:
    small = torch.zeros(8, device=device)
    wait(device)
    started = time.perf_counter()
    for _ in range(_LAUNCHES):
        small.add_(1)
    launched = time.perf_counter()
    wait(device)
    finished = time.perf_counter()
    for _ in range(_READS):
        float(small[0])
    read = time.perf_counter()
    return {
        "launch_host_us": 1e6 * (launched - started) / _LAUNCHES,
        "launch_device_us": 1e6 * (finished - started) / _LAUNCHES,
        "read_us": 1e6 * (read - finished) / _READS,
    }


def _products(stack: _Stack, device: torch.device) -> Row:
    """Measure the linear maps of a block, TFLOP/s: forward, and backward for input (dx) and weight (dw)."""
    shape = getattr(BACKBONES[stack.backbone], stack.part)
    rows, row = stack.clips * stack.tokens, Row()
    widths = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, MLP_RATIO), "fc2": (MLP_RATIO, 1)}
    for name, (inputs, outputs) in widths.items():
        row[name] = _product(rows, inputs * shape.width, outputs * shape.width, device)
    return row


def _product(rows: int, inputs: int, outputs: int, device: torch.device) -> dict[str, float]:
    def noise(*size: int) -> Tensor:
        return torch.randn(size, device=device).bfloat16()

    x, gradient, weight, bias = (
        noise(rows, inputs),
        noise(rows, outputs),
        noise(outputs, inputs),
        noise(outputs),
    )
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: F.linear(x, weight, bias),
        "dx": lambda: gradient @ weight,
        "dw": lambda: gradient.t() @ x,
    }
    return {name: 2e-12 * rows * inputs * outputs / best_time(call, device) for name, call in calls.items()}


def _attention(stack: _Stack, device: torch.device) -> Row:
    """Measure attention's forward pass, and forward plus backward, in milliseconds by back end."""
    shape = getattr(BACKBONES[stack.backbone], stack.part)
    size = (stack.clips, stack.tokens, 3, shape.heads, shape.width // shape.heads)
    qkv = torch.randn(size, device=device).bfloat16().requires_grad_()
    gradient = torch.randn(*size[:2], shape.width, device=device).bfloat16()
    row: Row = {"shape": list(size)}
    if device.type == "cuda":
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        chosen = torch._fused_sdp_choice(q, k, v)
        row["torch_chooses"] = SDPBackend(chosen).name
    return row | dict(_by_backend(qkv, gradient, device))


def _by_backend(qkv: Tensor, gradient: Tensor, device: torch.device) -> Iterator[tuple[str, object]]:
    for name, backend in _BACKENDS.items():
        if device.type != "cuda" and backend is not None:
            continue
        try:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                with torch.no_grad():
                    yield f"{name}_forward_ms", 1e3 * best_time(lambda: fused_attention(qkv), device)
                yield f"{name}_both_ms", 1e3 * best_time(partial(_both, qkv, gradient), device)
        except RuntimeError as error:  # the back end has no kernel for this shape
            yield f"{name}_error", str(error)[:120]


def _both(qkv: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(fused_attention(qkv), qkv, gradient)
