"""Tests of `precision: tf32`: float32 except in products on GPUs, refused on CPUs, timed at its own rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from everest_ds.config import Experiment, load_experiment
from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.memory import predict_memory
from everest_ds.costs.step_time import StepPrediction, predict_step
from everest_ds.models.matmul_precision import has_tf32, set_matmul_precision
from everest_ds.profiling.step_measurement import compute_dtype
from tests.ranks import run_ranks
from tests.training.faults import outcome
from tests.training.runs import experiment

CPU = torch.device("cpu")


@pytest.fixture
def strict_again() -> Iterator[None]:
    """Restore full float32 products in this process after a test."""
    yield
    set_matmul_precision("fp32")


def recipe(precision: str) -> Experiment:
    return load_experiment("k400_pretrain_vit_large", [f"precision={precision}"])


def test_only_tf32_lets_products_round(strict_again: None) -> None:
    found = []
    for precision in ("tf32", "fp32", "bf16"):
        set_matmul_precision(precision)
        found.append(torch.get_float32_matmul_precision())
    assert found == ["high", "highest", "highest"]


def test_a_cpu_refuses_it(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path).model_copy(update={"precision": "tf32"})
    (message,) = run_ranks(outcome, 1, config)
    assert (
        message == "ConfigError: precision: cpu does not support TF32; allowed: fp32; fix: set precision=fp32"
    )
    assert not has_tf32(CPU)


def test_memory_is_that_of_fp32_and_time_is_its_own() -> None:
    sheet = machine_from_sheet("A100", DEVICES["A100 40GB"])
    machine = replace(sheet, decode_s=0.0, decode_pixels_per_s=1e15)  # nothing waits for data

    def step(precision: str) -> StepPrediction:
        return predict_step(recipe(precision), 8, machine)

    assert predict_memory(recipe("tf32"), 8) == predict_memory(recipe("fp32"), 8)
    assert step("bf16").step_s < step("tf32").step_s < step("fp32").step_s / 2
    assert step("tf32").peak_flops_per_s == 8 * 156e12


def test_utilisation_is_of_the_rate_of_tensor_cores() -> None:
    assert compute_dtype("tf32", torch.device("cuda")) == "tf32"
