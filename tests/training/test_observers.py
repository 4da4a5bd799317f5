"""Tests of the observers: memory, useful FLOP/s and MFU in the metrics file and in TensorBoard."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from everest_ds.config import dump_experiment
from everest_ds.costs.compute import predict_macs
from everest_ds.log import logger, setup_logging
from everest_ds.parallel.world import World
from everest_ds.training.loop import train
from everest_ds.training.observers import (
    MetricsFile,
    ProgressLine,
    StepReport,
    TensorBoard,
    ValidationReport,
)
from everest_ds.training.throughput import ClipCost
from tests.ranks import run_ranks
from tests.training.runs import Row, experiment, metrics
from tests.training.terminal import screen_of


def report(**more: float | None) -> StepReport:
    facts = {
        "loss": 1.0,
        "lr": 0.1,
        "grad_norm": None,
        "clips_per_s": 4.0,
        "data_wait_pct": 0.0,
        "replaced_videos": 0,
    }
    cost = {"memory_bytes": 2**20, "tflops_per_s": 3.0, "mfu_pct": 7.5}
    return StepReport(step=1, epoch=0.5, **{**facts, **cost, **more})  # type: ignore[arg-type]


def scalars(folder: Path) -> dict[str, float]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}


def test_useful_rate_and_share_of_the_peak_are_of_each_rank() -> None:
    cost = ClipCost(flops=10**12, peak_flops_per_s=40e12)
    assert cost.tflops_per_s(clips_per_s=16, num_ranks=2) == 8
    assert cost.mfu_pct(clips_per_s=16, num_ranks=2) == 20


def test_an_unknown_device_has_flops_but_no_mfu(tmp_path: Path) -> None:
    cost = ClipCost(flops=10**12, peak_flops_per_s=None)
    assert cost.tflops_per_s(16, 2) == 8 and cost.mfu_pct(16, 2) is None
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.on_step(report(mfu_pct=None))
    file.close()
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["mfu_pct"] is None and row["tflops_per_s"] == 3 and row["memory_bytes"] == 2**20


@pytest.mark.parametrize("mfu_pct", [7.5, None])
def test_tensorboard_shows_memory_flops_and_the_mfu_if_known(tmp_path: Path, mfu_pct: float | None) -> None:
    board = TensorBoard(tmp_path, first_step=0)
    board.on_step(report(mfu_pct=mfu_pct))
    board.close()
    shown = scalars(tmp_path)
    assert shown["train/memory_bytes"] == 2**20 and shown["train/tflops_per_s"] == 3
    assert shown.get("train/mfu_pct") == mfu_pct


def train_with_a_cost(world: World, data: Path, folder: Path) -> None:
    train(experiment(data, folder), world, ClipCost(flops=10**9, peak_flops_per_s=10**12))


def test_every_logged_step_of_a_run_has_them(motion_data: Path, tmp_path: Path) -> None:
    run_ranks(train_with_a_cost, 1, motion_data, tmp_path / "run")
    rows: list[Row] = [row for row in metrics(tmp_path / "run") if "loss" in row]
    assert len(rows) == 9
    for row in rows:
        assert row["tflops_per_s"] == pytest.approx(row["clips_per_s"] * 10**9 / 1e12)
        assert row["mfu_pct"] == pytest.approx(100 * row["tflops_per_s"])
        assert row["memory_bytes"] > 0
    assert {"train/tflops_per_s", "train/mfu_pct"} <= set(scalars(tmp_path / "run" / "tensorboard"))


@pytest.mark.slow
def test_the_command_line_hands_in_the_cost(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path / "run", schedule={"epochs": 1, "warmup_epochs": 0})
    file = tmp_path / "run.yaml"
    file.write_text(dump_experiment(config))
    subprocess.run([sys.executable, "-m", "everest_ds", "pretrain", str(file), "--nproc", "1"], check=True)
    for row in metrics(tmp_path / "run"):
        flops = 2 * predict_macs(config).training_macs
        assert row["tflops_per_s"] == pytest.approx(flops * row["clips_per_s"] / 1e12)
        assert row["mfu_pct"] is None  # because the peak rate of a CPU is unknown


def a_run_in_a_terminal(folder: Path) -> None:
    """Report two steps and a validation of a run, with a warning and a print between them."""
    setup_logging(0, folder)
    line = ProgressLine(total_steps=64_000, first_step=31_998)
    figures = {"loss": 0.4321, "lr": 1.25e-4, "grad_norm": 0.09, "clips_per_s": 812.5, "data_wait_pct": 31}
    for step in (31_999, 32_000):
        line.on_step(replace(report(**figures), step=step, epoch=step / 1000))
        time.sleep(0.3)  # longer than the interval at which the line is drawn
    logger.warning("epoch 31: cannot read a-video-with-a-long-name-%s.mp4: no video stream", "x" * 60)
    line.on_validation(ValidationReport(32_000, 2.5, 1.0421, 71.43, 92.5, 0))
    print("printed by a library")
    line.close()


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_a_terminal_shows_step_loss_and_remaining_time_first_and_never_glues_lines(
    tmp_path: Path, columns: int
) -> None:
    *before, last, after = screen_of(lambda: a_run_in_a_terminal(tmp_path), columns)
    warning = f"epoch 31: cannot read a-video-with-a-long-name-{'x' * 60}.mp4: no video stream"
    assert "".join(before[:-2]).replace(" ", "") == warning.replace(" ", "")  # broken at the terminal's width
    assert before[-2:] == ["epoch 2.5 val loss 1.0421 top-1 71.43% top-5 92.50%", "printed by a library"]
    assert re.match(r"step 32000/64000 loss 0\.4321 ETA \d+h \d\dm \d\ds 812\.5 clips/s", last), last
    assert len(last) <= columns and after == ""
    rest = "mem 1.00 MiB wait 31% MFU 7.5% lr 1.25e-04 |g| 0.09"
    assert (rest in last) == (columns >= 120)


def test_the_log_file_of_a_run_in_a_terminal_has_every_report(tmp_path: Path) -> None:
    screen_of(lambda: a_run_in_a_terminal(tmp_path), 80)
    text = (tmp_path / "rank-0.log").read_text()
    assert [line.split(" ", 3)[3].split(" ETA")[0] for line in text.splitlines()[:2]] == [
        "step 31999/64000 epoch 32.00 loss 0.4321",
        "step 32000/64000 epoch 32.00 loss 0.4321",
    ]
    assert "cannot read" in text and "val loss 1.0421" in text


def test_a_slow_run_has_a_remaining_time_after_one_report(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One report an hour is enough for a remaining time: rich's own estimate forgets reports after 30 s."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(logger, "propagate", True)
    line = ProgressLine(total_steps=30, first_step=10)
    now[0] += 3600
    with caplog.at_level(logging.INFO):
        line.on_step(replace(report(), step=20))
    line.close()
    assert "loss 1.0000 ETA 1h 00m 00s" in caplog.text
