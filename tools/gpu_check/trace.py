"""The trace of training steps, with tables of the kernels and operators that take most time."""

from __future__ import annotations

import gzip
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from everest_ds.profiling.device_rates import wait

_STEPS = 2
_KERNELS, _OPERATORS = 60, 40
_NAME = 120  # characters kept of a kernel's name


def trace_steps(step: Callable[[], object], device: torch.device, file: Path) -> dict[str, Any]:
    """Trace two steps into `file` (Chrome's format, gzip) and return tables per step.

    Times are in milliseconds. Kernels, which include copies and fills of memory, are sorted by their time on
    the GPU; operators are sorted by their own time on the host.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as recorded:
        started = time.perf_counter()
        for _ in range(_STEPS):
            step()
        wait(device)
        seconds = (time.perf_counter() - started) / _STEPS
    _export(recorded, file)
    events = recorded.key_averages()
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
    busy_ms = sum(event.self_device_time_total for event in kernels) / 1e3 / _STEPS
    return {
        "step_ms": 1e3 * seconds,
        "device_busy_ms": busy_ms,
        "device_busy_pct": busy_ms / seconds / 10,
        "launches": sum(event.count for event in kernels) / _STEPS,
        "kernels": _rows(kernels, "self_device_time_total", _KERNELS),
        "operators": _rows(events, "self_cpu_time_total", _OPERATORS),
    }


def _rows(events: Any, time_us: str, most: int) -> list[dict[str, Any]]:
    longest = sorted(events, key=lambda event: -getattr(event, time_us))[:most]
    return [
        {"name": e.key[:_NAME], "calls": e.count / _STEPS, "ms": getattr(e, time_us) / 1e3 / _STEPS}
        for e in longest
    ]


def _export(recorded: Any, file: Path) -> None:
    plain = file.with_suffix("")  # compressed below: PyTorch's own gzip export needs an uncompressed copy too
    recorded.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(file, "wb", compresslevel=6) as target:
        shutil.copyfileobj(source, target)
    plain.unlink()
