"""Tests of measured time, on steps of known durations and on real ones."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import pytest
import torch

from everest_ds.costs.compute import predict_macs
from everest_ds.profiling.step_measurement import StepMeasurement, compute_dtype, measure_step
from everest_ds.profiling.step_phases import PhaseTimes, Spread, TrainingStep, measure_phases
from tests.models import experiment

CPU = torch.device("cpu")


def measurement(step_s: float, **more: Any) -> StepMeasurement:
    spread = Spread(step_s, step_s, step_s)
    times = PhaseTimes(spread, spread, spread, spread, spread)
    facts: dict[str, Any] = {
        "batch_size": 8,
        "repeats": 2,
        "useful_flops": 4 * 10**12,
        "peak_flops_per_s": 40e12,
        "device": "a GPU",
        "dtype": "bf16",
        "torch_version": "2",
        "commit": None,
    }
    return StepMeasurement(times, **{**facts, **more})


def test_phases_are_told_apart_and_the_data_wait_is_not_in_the_step() -> None:
    def phase(seconds: float) -> Any:
        return lambda *_: time.sleep(seconds)

    step = TrainingStep(phase(0.05), phase(0.01), phase(0.02), phase(0.03))
    times = measure_phases(step, CPU, warmup=0, repeats=2)
    assert times.data_wait.median_s >= 0.05
    medians = (times.forward.median_s, times.backward.median_s, times.optimizer.median_s)
    assert medians[0] >= 0.01 and medians[1] >= 0.02 and medians[2] >= 0.03
    assert times.step.median_s == pytest.approx(sum(medians), rel=0.3)
    assert times.step.median_s < times.data_wait.median_s + sum(medians)


def test_each_phase_gets_what_the_one_before_made_and_warm_up_steps_are_left_out() -> None:
    seen: list[Any] = []
    numbers = count()

    def optimize() -> None:
        seen.append("optimize")

    step = TrainingStep(
        lambda: next(numbers),
        lambda batch: torch.tensor(batch),
        lambda loss: seen.append(int(loss)),
        optimize,
    )
    measure_phases(step, CPU, warmup=2, repeats=3)
    assert seen == [0, "optimize", 1, "optimize", 2, "optimize", 3, "optimize", 4, "optimize"]


def test_the_first_slow_steps_do_not_move_the_median() -> None:
    waits = iter([0.2, 0.01, 0.01, 0.01])
    step = TrainingStep(lambda: None, lambda _: time.sleep(next(waits)), lambda _: None, lambda: None)  # type: ignore[arg-type, return-value]
    times = measure_phases(step, CPU, warmup=1, repeats=3)
    assert times.forward.quartile_1_s <= times.forward.median_s <= times.forward.quartile_3_s < 0.1


def test_mfu_is_the_useful_rate_over_the_peak() -> None:
    half_a_second = measurement(step_s=0.5)
    assert half_a_second.flops_per_s == 8e12 and half_a_second.mfu_pct == 20
    assert half_a_second.clips_per_s == 16
    assert half_a_second.epoch_s(num_clips=320, num_ranks=4) == 5


def test_an_unknown_device_has_no_mfu() -> None:
    assert measurement(step_s=0.5, peak_flops_per_s=None).mfu_pct is None


def test_a_step_of_several_micro_batches_is_the_sum_of_its_rounds() -> None:
    config = experiment("pretrain", "rero")

    def phase(seconds: float) -> Any:
        return lambda *_: time.sleep(seconds)

    step = TrainingStep(phase(0.0), phase(0.01), phase(0.02), phase(0.0), micro_batches=3)
    measured = measure_step(step, config, CPU, commit="abc", warmup=0, repeats=2)
    assert measured.times.forward.median_s >= 0.03 and measured.times.backward.median_s >= 0.06
    assert measured.batch_size == 3 * config.batch.micro_batch_size
    assert measured.useful_flops == 2 * predict_macs(config).training_macs * measured.batch_size
    assert (measured.commit, measured.torch_version) == ("abc", torch.__version__)
    assert measured.device and measured.mfu_pct is None  # the table lists no peak rate of a processor


def test_float32_products_through_tensor_cores_have_another_peak() -> None:
    cuda, before = torch.device("cuda"), torch.get_float32_matmul_precision()
    assert compute_dtype("fp32", cuda) == "fp32"
    torch.set_float32_matmul_precision("high")
    try:
        assert compute_dtype("fp32", cuda) == "tf32" and compute_dtype("bf16", cuda) == "bf16"
        assert compute_dtype("fp32", CPU) == "fp32"
    finally:
        torch.set_float32_matmul_precision(before)
