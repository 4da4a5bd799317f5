"""Tests of measured training steps: stored in files and compared with the published tables."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from everest_ds.config import load_experiment
from everest_ds.efficiency.measured import PROFILE_FORMAT, Measured, measured_rows, read_measured
from everest_ds.efficiency.published import select_cells
from everest_ds.errors import UsageError

MEASURED = Measured(
    subject="k400_pretrain_vit_base",
    config=load_experiment("k400_pretrain_vit_base"),
    device="NVIDIA H100 80GB HBM3",
    dtype="bf16",
    torch_version="2.9",
    commit="0123456789",
    phases_ms={"forward": 10.0, "backward": 20.0, "optimizer": 2.0},
    step_ms=(31.0, 32.0, 33.0),
    clips_per_s=1000.0,
    tflops_per_s=122.0,
    mfu_pct=12.3,
    peak_memory_bytes=5 * 10**9,
)


def test_a_measurement_reads_back_as_it_was_written(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"format": PROFILE_FORMAT, "measured": MEASURED.as_json()}))
    assert asdict(read_measured(file)) == asdict(MEASURED)


def test_a_config_of_another_version_is_refused(tmp_path: Path) -> None:
    written = MEASURED.as_json()
    written["config"]["tokens"]["gone"] = 1
    file = tmp_path / "p.json"
    file.write_text(json.dumps({"format": PROFILE_FORMAT, "measured": written}))
    with pytest.raises(UsageError, match="written by another version"):
        read_measured(file)


def test_a_measurement_stands_beside_the_cells_of_the_same_tokens_and_backbone() -> None:
    rows = {(row.table, row.column): row for row in measured_rows(select_cells(), [MEASURED])}
    assert set(rows) == {
        ("pretraining_cost", "pt_time"),
        ("pretraining_cost", "memory_gb"),
        ("k400", "memory_gb"),
    }
    assert all(
        row.kind == "measured" and (row.method, row.backbone) == ("EVEREST", "ViT-B") for row in rows.values()
    )
    memory = rows["pretraining_cost", "memory_gb"]
    assert memory.value == 40.0 and memory.gap_pct == pytest.approx(-39.67)
    for said in ("8 x one NVIDIA H100", "bf16", "torch 2.9", "commit 0123456", "32 clips per GPU"):
        assert said in memory.note
    epoch = rows["pretraining_cost", "pt_time"]
    assert (epoch.value, epoch.gap_pct) == ("30s", None)  # 240,000 clips at 8 x 1000 per second
    assert "without data wait" in epoch.note


def test_other_keep_ratios_and_devices_without_a_peak_add_no_memory_rows() -> None:
    other = replace(MEASURED, config=load_experiment("k400_pretrain_vit_base", ["tokens.keep_ratio=0.3"]))
    assert measured_rows(select_cells(), [other]) == []
    on_cpu = replace(MEASURED, peak_memory_bytes=None)
    assert {row.column for row in measured_rows(select_cells(), [on_cpu])} == {"pt_time"}
