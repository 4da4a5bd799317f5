"""Tests of the GPU check's trace of a step: its kernels appear in the table and in the file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from tests.gpu import ON_CUDA
from tests.models import built, experiment, loss_of, random_clips

pytestmark = ON_CUDA


def test_kernels_of_a_step_are_in_the_table_and_in_the_file(tmp_path: Path) -> None:
    from gpu_check.trace import trace_steps

    config = experiment("pretrain", "rero")
    model, clips, keys = built(config).cuda(), random_clips(config, 2).cuda(), torch.arange(2).cuda()

    def step() -> None:
        loss_of(model(clips, keys)).backward()

    step()
    table = trace_steps(step, torch.device("cuda"), tmp_path / "step.trace.json.gz")
    assert 0 < table["device_busy_ms"] <= 1.05 * table["step_ms"]
    assert table["launches"] >= sum(kernel["calls"] for kernel in table["kernels"]) > 100
    assert any(name in str(table["kernels"]) for name in ("gemm", "nvjet", "cutlass"))
    events = json.loads(gzip.decompress((tmp_path / "step.trace.json.gz").read_bytes()))["traceEvents"]
    on_the_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    assert len(on_the_device) == 2 * table["launches"]
