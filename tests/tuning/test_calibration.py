"""Tests of calibration: a machine is fitted to measurements, and its file is valid on that machine only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from everest_ds.config.schema import Experiment
from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.costs.hardware.machine import Link, intensity
from everest_ds.costs.step_time import predict_step
from everest_ds.errors import UsageError
from everest_ds.tuning.calibration.file import Calibration, read_calibration
from everest_ds.tuning.calibration.fit import (
    CollectiveSample,
    Measurements,
    TrainedStep,
    fit_curve,
    fit_links,
    fit_machine,
)

FACTS = {"device": "a processor", "torch": "2.13.0"}
SHEET = machine_from_sheet("T4", DEVICES["T4"])
CPU = replace(SHEET, asynchronous=False)


def tiny(stage: int) -> Experiment:
    return Experiment.model_validate(
        {
            "task": "pretrain",
            "model": {"backbone": "vit_tiny"},
            "batch": {"micro_batch_size": 1},
            "precision": "fp32",
            "parallelism": {"zero_stage": stage},
        }
    )


def measurements(steps: list[TrainedStep], samples: list[CollectiveSample]) -> Measurements:
    return Measurements(
        device="a processor",
        memory_bytes=2**34,
        asynchronous=False,
        num_ranks=2,
        threads=1,
        products={"fp32": [((64, 192, 768), 5e10), ((1024, 768, 3072), 1e11)]},
        attention={"fp32": [(16.0, 1e10), (256.0, 5e10)]},
        moving={"fp32": [(1e5, 1e10)]},
        copy_bytes_per_s=1e10,
        fresh_bytes_per_s=2e9,
        adam_values_per_s=1e9,
        launch_s=1e-5,
        host_bytes_per_s=5e9,
        host_adam_values_per_s=1e9,
        collectives=samples,
        clips=[(1e5, 0.011), (1e6, 0.020)],
        steps=steps,
        spare_cores=0.0,
        baseline_bytes=2**28,
    )


def samples(link: Link) -> list[CollectiveSample]:
    """Return the times of rings over a link: n - 1 parts between neighbours, twice that for all-reduce."""
    return [
        CollectiveSample(name, ranks, size, turns * (ranks - 1) * link.seconds(size / ranks))
        for name, turns in (("all_reduce", 2), ("reduce_scatter", 1), ("all_gather", 1))
        for ranks in (2, 4)
        for size in (2**12, 2**18, 2**24)
    ]


def test_links_are_found_again_from_their_times() -> None:
    true = Link(2e-4, 8e8)
    for found in fit_links(samples(true)).values():
        assert found.latency_s == pytest.approx(true.latency_s)
        assert found.bytes_per_s == pytest.approx(true.bytes_per_s)


def test_noise_gives_no_negative_latency() -> None:
    rows = [
        CollectiveSample("all_reduce", 2, size, size / 1e9 * slower)
        for size, slower in ((2**20, 1), (2**24, 2))
    ]
    found = fit_links([*rows, *samples(Link(1e-4, 1e9))[6:]])
    assert found["all_reduce"].latency_s == 0.0 and found["all_reduce"].bytes_per_s > 0


def test_a_curve_goes_through_the_middle_of_each_octave() -> None:
    curve = fit_curve([(100.0, 1e9), (110.0, 4e9), (800.0, 8e9)])
    assert curve.sizes == pytest.approx(((100 * 110) ** 0.5, 800.0))
    assert curve.rates == pytest.approx((2e9, 8e9))


def test_a_fitted_machine_repeats_its_measurements() -> None:
    found = fit_machine(measurements([], samples(Link(1e-4, 1e9))), {}, "a test")
    assert found.products["fp32"].at(intensity(1024, 768, 3072)) == pytest.approx(1e11)
    assert found.attention["fp32"].at(64) == pytest.approx((1e10 * 5e10) ** 0.5)
    assert found.decode_s == pytest.approx(0.010) and found.decode_pixels_per_s == pytest.approx(1e8)
    assert (found.ranks_per_node, found.threads, found.baseline_bytes) == (2, 1, 2**28)


def test_what_the_engine_adds_to_a_step_is_learned_by_stage() -> None:
    """A step measured 0.1 s above its terms is predicted with those 0.1 s as overhead."""
    bare = fit_machine(measurements([], []), {}, "a test")
    steps = []
    for stage, beyond in ((0, 0.1), (3, 0.3)):
        terms = predict_step(tiny(stage), 1, bare)
        steps.append(TrainedStep(tiny(stage), 1, terms.step_s - terms.term("data").seconds + beyond))
    fitted = fit_machine(measurements(steps, []), {}, "a test")
    for stage, beyond in ((0, 0.1), (3, 0.3)):
        added = [predict_step(tiny(stage), 1, machine).split()["overhead"] for machine in (fitted, bare)]
        assert added[0] - added[1] == pytest.approx(beyond)


def test_a_calibration_survives_its_file(tmp_path: Path) -> None:
    kept = Calibration(FACTS, "2026-01-01T00:00:00+00:00", {1: CPU, 2: CPU})
    kept.write(tmp_path / "folder" / "calibration.json")
    assert read_calibration(tmp_path / "folder" / "calibration.json", FACTS) == kept


def test_gpus_serve_fewer_ranks_and_cpus_do_not() -> None:
    assert Calibration(FACTS, "", {8: SHEET}).machine(2) is SHEET
    with pytest.raises(UsageError, match="--nproc 2"):
        Calibration(FACTS, "", {4: CPU}).machine(2)


def test_a_calibration_of_another_machine_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "calibration.json"
    Calibration(FACTS, "", {1: CPU}).write(file)
    with pytest.raises(UsageError, match="in torch; given: 2.13.0 in the file, 2.14.0 on this machine"):
        read_calibration(file, {**FACTS, "torch": "2.14.0"})


@pytest.mark.parametrize("content", ["", "[]", '{"format": "everest-ds calibration, format 0"}'])
def test_a_damaged_or_old_calibration_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "calibration.json"
    file.write_text(content)
    with pytest.raises(UsageError, match="tune --calibrate"):
        read_calibration(file, FACTS)


def test_no_calibration_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not calibrated; fix: everest-ds tune --calibrate"):
        read_calibration(tmp_path / "none.json", FACTS)
