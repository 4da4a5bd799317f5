"""Tests of the step benchmark: peers that skip steps or fail, recorded products, the whole command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everest_ds.costs.compute import predict_macs
from everest_ds.models import build_model
from tests.models import experiment, random_clips

CPU = torch.device("cpu")
TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def bench() -> Any:
    """Import tools/bench_step.py, which imports its neighbours."""
    import bench_step

    return bench_step


@pytest.fixture
def rates() -> Any:
    """Import tools/bench_rates.py."""
    import bench_rates

    return bench_rates


def peer(name: str, loss_scale: float, extra_values: int = 0) -> Any:
    """Return a peer with one linear map, whose loss can overflow fp16 or take too much memory."""
    from peers import Peer, PeerBatch

    model = nn.Linear(4, 4)

    def loss(batch: Any) -> Tensor:
        unused = torch.empty(extra_values)
        return loss_scale * model(batch.video_BCFHW).sum() + unused.numel()

    return Peer(name, model, lambda clip, label: PeerBatch(torch.ones(1, 4), None, None), loss)


def contenders(bench: Any, *peers: Any) -> list[Any]:
    batch = bench.noise_batch(experiment("pretrain", "rero"), CPU)
    return [each for one in peers for each in bench.peer_contenders(one, ["bf16"], batch)]


def test_steps_that_the_loss_scale_skips_are_counted_and_not_timed(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of 4 times the scale overflow fp16 at a loss scale of 65536, but not at 8192."""
    import bench_contenders

    monkeypatch.setattr(bench_contenders, "_half", lambda device: torch.float16)
    one, hopeless = contenders(bench, peer("one", 4.0), peer("hopeless", float("inf")))
    for contender in (one, hopeless):
        bench.attempt(contender, lambda: bench._warm_up(contender, 2, CPU))  # noqa: B023
    assert (one.skipped, one.failure) == (3, None)
    assert hopeless.failure == "skipped its first 20 steps"
    bench._take_turns(3, [one, hopeless], CPU)
    row = bench._summary(one, 1, CPU)
    assert len(one.taken) == 3 and row["skipped_steps"] == 3 and row["loss_scale"] == 8192
    assert bench._summary(hopeless, 1, CPU)["step_ms"] is None


def test_a_contender_out_of_memory_is_a_column_and_the_others_go_on(bench: Any) -> None:
    """The allocator refuses a petabyte, and only the contender that asked for it fails."""
    one, huge = contenders(bench, peer("one", 1.0), peer("huge", 1.0, extra_values=2**48))
    for contender in (one, huge):
        bench.attempt(contender, lambda: bench._warm_up(contender, 1, CPU))  # noqa: B023
    bench._take_turns(2, [one, huge], CPU)
    rows = [bench._summary(contender, 1, CPU) for contender in (one, huge)]
    assert [row["failure"] for row in rows] == [None, "out of memory"]
    assert rows[0]["step_ms"] > 0 and rows[1]["step_ms"] is None and huge.step is None
    one.is_engine = True
    assert bench._ratios([one, huge]) == []


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
    labels = ["ours fp32", "ours bf16", "plain fp32", "plain bf16"]
    assert [row["contender"] for row in result["contenders"]] == labels
    full, half = (row["passes_peak_bytes"] for row in result["contenders"][2:])
    assert 0 < half < full
    assert [len(steps) for steps in result["steps"].values()] == [2, 2, 2, 2]
    assert [row["contender"] for row in result["rates"]] == labels[:2]
    assert all(row["limit_ms"] > 0 for row in result["rates"])
    assert len(result["ratios"]) == 3
    assert result["profile"] and "Ratios" in done.stdout


def test_a_folder_that_is_no_clone_is_a_mistake_told_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOLS / "bench_step.py"), "pretrain", "--backbone", "vit_small"]
    done = subprocess.run([*command, "--peer", f"everest={tmp_path}"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(
        f"error: {tmp_path}: contains no modeling_pretrain.py; fix: git clone https://"
    )
    assert len(done.stderr.splitlines()) == 1
