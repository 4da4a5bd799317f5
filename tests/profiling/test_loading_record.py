"""Tests of the record of measured loading: it is used for the data and settings that were measured only."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from everest_ds.config import Experiment, load_experiment
from everest_ds.costs.bottleneck import LoadingCost, MeasuredLoading
from everest_ds.costs.clip_supply import loading_cost
from everest_ds.profiling.loading_record import recorded_loading, write_loading
from everest_ds.training.prediction import describe_prediction, parse_gpus
from everest_ds.tuning.cluster import cluster_of
from tests.data.store.conftest import pack

FOUND = MeasuredLoading(LoadingCost(500, 5, 2, 4, 1e6), 4e9, 3e9, "on a node, 2026-01-01")


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a manifest, with the user's cache in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "train.txt"
    file.write_text("a.mp4 0\n")
    return file


def recipe(manifest: Path, *settings: str) -> Experiment:
    return load_experiment("k400_pretrain_vit_base", [f"data.train={manifest}", *settings])


def test_a_measurement_counts_for_its_data_and_clips_until_the_data_change(manifest: Path) -> None:
    config = recipe(manifest)
    assert recorded_loading(config) is None
    file = write_loading(manifest, config, FOUND)
    assert recorded_loading(config) == FOUND
    assert recorded_loading(recipe(manifest, "data.num_workers=9", "data.repeats=2")) == FOUND
    for setting in ("data.decoder=decord", "data.frame_stride=2", "model.image_size=112"):
        assert recorded_loading(recipe(manifest, setting)) is None, setting
    os.utime(manifest, ns=(1, 1))
    assert recorded_loading(config) is None
    write_loading(manifest, config, FOUND)
    file.write_text("{}")
    assert recorded_loading(config) is None


def test_settings_are_recorded_beside_each_other(manifest: Path) -> None:
    slow, fast = recipe(manifest), recipe(manifest, "data.decoder=decord")
    write_loading(manifest, slow, FOUND)
    write_loading(manifest, fast, replace(FOUND, copy_bytes_per_s=9e9))
    assert recorded_loading(slow) == FOUND
    assert (recorded_loading(fast) or FOUND).copy_bytes_per_s == 9e9


def test_a_dry_run_and_the_tuner_use_what_was_measured(manifest: Path) -> None:
    config = recipe(manifest, "data.num_workers=2")
    before = facts(config)
    assert "(predicted)" in before["data"] and "doctor --data" in before["data"]
    write_loading(manifest, config, FOUND)
    after = facts(config)
    rate = 2 / 0.507  # two workers, 500 + 5 + 2 ms a clip
    assert f"decoding binds: {rate:.3g} clips/s per rank (measured)" in after["data"]
    assert FOUND.place in after["data"]
    assert cluster_of("h100-80gb", 8, None, None).loading_data_of(config).machine.loading == FOUND


def facts(config: Experiment) -> dict[str, Any]:
    return describe_prediction(config, parse_gpus("8xh100-80gb"), num_samples=None)


def test_a_frame_store_that_was_not_measured_decodes_at_its_usual_rate(
    manifest: Path, motion_data: Path, tmp_path: Path
) -> None:
    pack(motion_data / "val.txt", tmp_path / "store")
    on_store = recipe(tmp_path / "store")
    videos, stored = (
        cluster_of("h100-80gb", 8, None, None).loading_data_of(config).machine
        for config in (recipe(manifest), on_store)
    )
    clips = [loading_cost(recipe(manifest), machine).decode_ms for machine in (videos, stored)]
    assert clips[0] / clips[1] == pytest.approx(66 / 6.8)
    assert "(predicted)" in facts(on_store)["data"]
    assert "The loader's rate is that of a frame store" in facts(on_store)["data"]
    write_loading(tmp_path / "store", on_store, FOUND)
    assert facts(on_store)["data"].endswith("The loader was measured on a node, 2026-01-01.")
