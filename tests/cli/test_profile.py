"""Tests of `everest-ds profile` as a user types it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_cli import run_main


def profile(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run `everest-ds profile *arguments --json` and return the JSON that it writes."""
    file = folder / "profile.json"
    assert run_main(monkeypatch, "profile", *arguments, "--json", str(file)) == 0
    written: dict[str, Any] = json.loads(file.read_text())
    return written


def by(key: str, table: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row[key]: row for row in table}


def test_a_vit_huge_is_profiled_without_its_weights(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = profile(
        monkeypatch, tmp_path, "k400_pretrain_vit_base", "model.backbone=vit_huge", "--ranks", "8"
    )
    for row in found["compute"]:
        assert row["predicted"] == pytest.approx(row["counted"], rel=1e-12), row["figure"]
    operators = by("operator", found["by_operator"])
    modules = by("module", found["by_module"])
    forward = by("figure", found["compute"])["forward, GMACs"]["counted"]
    for table in (operators, modules):
        assert sum(row["forward_gmacs"] for row in table.values()) == pytest.approx(forward)
    assert "encoder.blocks.*.mlp.fc1" in modules and "aten.gelu" in by("operator", found["not_counted"])
    memory = by("category", found["memory"])
    peak = memory.pop("peak")
    assert sum(row["predicted_mib"] for row in memory.values()) == pytest.approx(peak["predicted_mib"])
    # ZeRO-2 shares AdamW's states over the 8 ranks; the count is for one rank without sharing.
    states = memory["optimizer_states"]
    assert states["counted_mib"] == pytest.approx(8 * states["predicted_mib"], rel=1e-3)
    assert {row["phase"] for row in found["memory_over_time"]} == {"forward", "backward", "optimizer"}
    assert found["measured"] is None
    printed = capsys.readouterr().out
    assert "predicted" in printed and "counted" in printed and "not in the counts" in printed


def test_a_published_system_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = profile(monkeypatch, tmp_path, "xvit")
    compute = by("figure", found["compute"])
    assert compute["forward, 3 views as published: literature's GFLOPs"] == {
        "figure": "forward, 3 views as published: literature's GFLOPs",
        "counted": pytest.approx(422.18, abs=0.01),
    }
    assert found["config"] is None and found["memory"][-1]["counted_mib"] > 0


def test_what_was_measured_can_be_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The engine and the plain loop are measured; a global batch of many ranks does not slow one down."""
    small = ["model.num_frames=4", "batch.micro_batch_size=2", "batch.global_batch_size=1024"]
    found = profile(monkeypatch, tmp_path, "demo_finetune", *small, "--measure")
    measured = found["measured"]
    assert measured["clips_per_s"] > 0 and measured["device"] and measured["mfu_pct"] is None
    assert set(measured["phases_ms"]) == {"forward", "backward", "optimizer"}
    assert measured["config"]["batch"]["global_batch_size"] is None
    assert found["plain_loop"].keys() == measured.keys() and found["plain_loop"]["clips_per_s"] > 0
    assert "RANK" not in os.environ
    file, out = str(tmp_path / "profile.json"), tmp_path / "out"
    chosen = ["--tables", "parameters", "--models", "VideoMAE", "--out", str(out)]
    assert run_main(monkeypatch, "report", "--measured", file, *chosen) == 0
    assert (out / "plots/step_time.svg").is_file()
    assert f"{file}: this report has no published figure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mvit_x"], "did you mean mvit_"),
        (["demo_pretain"], "did you mean demo_pretrain"),
        (["mvit_b", "--ranks", "4"], "on one rank"),
        (["mvit_b", "batch.micro_batch_size=4"], "as it was published"),
        (["demo_pretrain", "model.image_size=60"], "not a multiple of patch_size=8"),
        (["demo_pretrain", "parallelism.tensor=2", "--ranks", "3"], "2, 3 ranks"),
    ],
)
def test_a_mistake_gets_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run_main(monkeypatch, "profile", *arguments) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1
