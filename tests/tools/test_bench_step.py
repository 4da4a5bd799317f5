"""The step benchmark: its optimiser, what it records, and the whole command on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everest_ds.models import build_model
from everest_ds.profiling.compute import predict_macs
from tests.models import experiment, random_clips

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def contenders(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tools/bench_contenders.py, as its neighbours import it."""
    monkeypatch.syspath_prepend(TOOLS)
    import bench_contenders

    return bench_contenders


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> Any:
    """tools/bench_rates.py."""
    monkeypatch.syspath_prepend(TOOLS)
    import bench_rates

    return bench_rates


def test_the_bf16_step_is_adamw_on_float32_masters(contenders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "_CHUNK_ELEMENTS", 40)  # three chunks of these parameters
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(size).bfloat16()) for size in ((7, 5), (35,), (3, 3))]
    masters = [nn.Parameter(parameter.detach().float()) for parameter in parameters]
    expected = torch.optim.AdamW(masters, **contenders._ADAMW)
    optimizer = contenders.MasterAdamW(parameters)
    assert len(optimizer.chunks) == 3
    for _ in range(5):
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.grad = torch.randn_like(parameter)
            master.grad = parameter.grad.float()
        optimizer.step()
        expected.step()
        for parameter, master in zip(parameters, masters, strict=True):
            assert torch.equal(parameter, master.bfloat16())
    optimizer.zero_grad()
    assert all(not parameter.grad.any() for parameter in parameters if parameter.grad is not None)


@pytest.mark.parametrize(("task", "selection"), [("pretrain", "rero"), ("finetune", "none")])
def test_recorded_products_and_attention_are_the_predicted_macs(
    rates: Any, task: str, selection: str
) -> None:
    config = experiment(task, selection)
    model, clip = build_model(config), random_clips(config, 2)

    def step() -> None:
        output = model(clip, torch.arange(2))
        loss: Tensor = output.loss if task == "pretrain" else output.sum()
        loss.backward()

    recorder = rates.record(step)
    assert recorder.product_macs + recorder.attention_macs == 2 * predict_macs(config).training_macs
    assert recorder.attentions


def test_a_layout_is_made_again_with_its_strides(rates: Any) -> None:
    for original in (torch.zeros(4, 6).t(), torch.zeros(2, 9, 12)[:, :, 3:6], torch.zeros(1, 5).expand(3, 5)):
        made = rates.Layout.of(original).make(torch.device("cpu"))
        assert made.shape == original.shape
        assert made.stride() == original.stride() or 0 in original.stride()


@pytest.mark.slow
def test_the_command_measures_two_dtypes_in_turn_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "step.json"
    clip = ["--backbone", "vit_tiny", "--frames", "8", "--size", "64", "--threads", "1"]
    dtypes = ["--dtype", "fp32", "--dtype", "bf16", "--device", "cpu"]
    command = [sys.executable, str(TOOLS / "bench_step.py"), "pretrain", *clip, *dtypes]
    command += ["--rounds", "2", "--warmup", "1", "--profile", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert [row["contender"] for row in result["contenders"]] == ["ours fp32", "ours bf16"]
    full, half = (row["activations_peak_bytes"] for row in result["contenders"])
    assert 0 < half < full
    assert [len(steps) for steps in result["steps"].values()] == [2, 2]
    assert all(row["limit_ms"] > 0 for row in result["rates"])
    assert result["profile"] and "Ratios" in done.stdout


def test_a_folder_that_is_no_clone_is_a_mistake_told_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "bench_step.py"), "pretrain", "--backbone", "vit_small"]
    done = subprocess.run([*command, "--peer", f"everest={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: {tmp_path}: holds no modeling_pretrain.py; fix: git clone https://"
    )
    assert len(done.stderr.splitlines()) == 1
