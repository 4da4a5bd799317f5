"""Tests of how a config and a machine become a supply of clips, and of the step that waits for them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from everest_ds.costs.bottleneck import LoadingCost, MeasuredLoading, find_bottleneck
from everest_ds.costs.clip_supply import clip_supply, loading_cost
from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.hardware.machine import Machine
from everest_ds.costs.step_time import predict_step, supply_of_step
from tests.costs.test_step_time import experiment

SHEET = machine_from_sheet("H100 SXM", DEVICES["H100 SXM"])
MEASURED = MeasuredLoading(LoadingCost(50, 5, 2, 4, 1e6), 4e9, 3e9, "on a node, 2026-01-01")
HERE = replace(SHEET, loading=MEASURED)


def test_unmeasured_videos_are_a_little_larger_than_their_crops() -> None:
    cost = loading_cost(experiment(data={"frame_stride": 2}), SHEET)
    pixels = 16 * 2 * 256 * 341  # frames of 256 x 341 for crops of 224
    assert cost.decode_ms == pytest.approx(1e3 * pixels / SHEET.decode_pixels_per_s, rel=0.01)
    assert cost.crop_ms == 1e3 * SHEET.decode_s and cost.read_bytes == 0


def test_a_measurement_replaces_the_assumptions() -> None:
    config = experiment()
    assert loading_cost(config, HERE) == MEASURED.cost
    before, after = (clip_supply(config, 8, machine, 100.0) for machine in (SHEET, HERE))
    assert (before.basis, after.basis) == ("predicted", "measured")
    assert before.disk_bytes_per_s is None and after.disk_bytes_per_s == 4e9
    assert before.copy_bytes_per_s == SHEET.host_link.bytes_per_s
    assert after.copy_bytes_per_s == 3e9  # the slower of the link and the copy in memory
    assert after.ranks_per_node == 8 and clip_supply(config, 4, HERE, 100.0).ranks_per_node == 4


def test_ranks_on_a_cpu_copy_nothing_to_a_device() -> None:
    cpu = replace(HERE, asynchronous=False)
    assert clip_supply(experiment(), 1, cpu, 100.0).copy_bytes_per_s is None


def test_a_packed_clip_has_the_bytes_of_its_kept_tubelets() -> None:
    config = experiment(tokens={"selection": "rero", "score": "pixel", "keep_ratio": 0.3})
    supply = clip_supply(config, 8, SHEET, 100.0)
    assert supply.clip_bytes == 16 * 224 * 224 * 3
    tubelet = 2 * 16 * 16 * 3 + 4  # with its index
    assert supply.packed_bytes == config.token_counts.num_kept * tubelet


@pytest.mark.parametrize(
    "machine",
    [
        SHEET,
        HERE,
        replace(HERE, loading=replace(MEASURED, disk_bytes_per_s=1e6)),
        replace(HERE, spare_cores=0.0),
    ],
    ids=["assumed", "measured", "slow disk", "no spare cores"],
)
def test_a_predicted_step_delivers_the_clips_of_its_bottleneck(machine: Machine) -> None:
    config = experiment(batch={"micro_batch_size": 32})
    step = predict_step(config, 8, machine)
    supply = supply_of_step(step, config, 8, machine)
    found = find_bottleneck(loading_cost(config, machine), supply)
    assert step.clips_per_s / 8 == pytest.approx(found.clips_per_s)
    assert supply.model_clips_per_s == pytest.approx(32 / (step.step_s - step.split()["data"]))
    assert (found.binding == "disk") == (
        machine.loading is not None and machine.loading.disk_bytes_per_s == 1e6
    )
