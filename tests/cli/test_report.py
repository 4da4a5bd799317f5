"""Tests of `everest-ds report` as a user types it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imsave

from tests.cli.test_cli import run_main

ROW_KEYS = ["table", "method", "backbone", "column", "published", "value", "kind", "gap_pct", "note"]


def write_run(folder: Path, rows: list[dict[str, object]]) -> Path:
    """Write a run folder as training would leave it, without training."""
    folder.mkdir()
    (folder / "config.yaml").write_text("base: demo_finetune\n")
    environment = {
        "world_size": 2,
        "packages": {"torch": "2.9"},
        "git": {"commit": "abcdef0123", "dirty": False},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def step(number: int, clips_per_s: float, loss: float) -> dict[str, object]:
    speed = {"clips_per_s": clips_per_s, "data_wait_pct": 5.0, "memory_bytes": 2**29, "mfu_pct": None}
    return {"step": number, "loss": loss, **speed}


def test_a_report_is_a_folder_of_every_format(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    code = run_main(
        monkeypatch,
        "report",
        "--tables",
        "k400,pretraining_cost",
        "--models",
        "ViT-S,vit-b",
        "--out",
        str(out),
    )
    assert code == 0, capsys.readouterr().err
    rows = json.loads((out / "report.json").read_text())
    assert all(list(row) == ROW_KEYS for row in rows)
    assert {row["table"] for row in rows} == {"pretraining_cost", "k400"}
    assert {row["backbone"] for row in rows} == {"ViT-S", "ViT-B"}
    with open(out / "k400.csv", newline="") as file:
        assert [row["value"] for row in csv.DictReader(file)][0] == "11.557"
    assert "35.5 / 35.48ᵖ (✓)" in (out / "report.md").read_text()
    assert (out / "report.html").read_text().count("<svg") == len(list((out / "plots").glob("*.svg"))) == 3
    assert "to the printed digit" in capsys.readouterr().out


def test_runs_are_compared_by_what_they_compute_hold_and_reach(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = write_run(tmp_path / "a", [step(1, 10.0, 1.8), step(2, 99.0, 1.5), step(3, 101.0, 1.2)])
    second = write_run(tmp_path / "b", [step(1, 50.0, 1.7), {"step": 1, "val_top1": 40.0}])
    (second / "evaluation.json").write_text(json.dumps({"top1": 55.0}))
    assert run_main(monkeypatch, "report", str(first), str(second), "--out", str(tmp_path / "out")) == 0
    rows = json.loads((tmp_path / "out/report.json").read_text())
    assert {row["table"] for row in rows} == {"runs"}
    found = {(row["method"], row["column"], row["kind"]): row["value"] for row in rows}
    assert found["a", "clips_per_s", "measured"] == 100.0  # the median without the first
    assert found["a", "loss", "measured"] == 1.2
    assert found["a", "memory_gib", "measured"] == 0.5
    assert found["a", "memory_gib", "predicted"] > 0
    assert found["b", "top1", "measured"] == 55.0
    assert ("a", "top1", "measured") not in found and ("a", "mfu_pct", "measured") not in found


def test_losses_of_different_tasks_have_axes_of_their_own_and_validations_a_curve(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fine = write_run(
        tmp_path / "fine",
        [step(1, 9.0, 1.75), {"step": 2, "val_loss": 1.5, "val_top1": 31.0}, step(3, 9.0, 1.25)],
    )
    pre = write_run(tmp_path / "pre", [step(1, 9.0, 0.75), step(2, 9.0, 0.5)])
    (pre / "config.yaml").write_text("base: demo_pretrain\n")
    assert run_main(monkeypatch, "report", str(fine), str(pre), "--out", str(tmp_path / "out")) == 0
    plots = {file.stem: file.read_text() for file in (tmp_path / "out/plots").glob("*.svg")}
    assert set(plots) == {"pretrain_loss", "finetune_loss", "validation", "throughput"}
    assert "cross-entropy" in plots["finetune_loss"] and "fine, validation" in plots["finetune_loss"]
    assert "mean squared error" in plots["pretrain_loss"] and "fine" not in plots["pretrain_loss"]
    assert "top-1" in plots["validation"] and "pre" not in plots["validation"]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--tables", "k40"], 2, "did you mean k400"),
        (["--models", "EVREST"], 2, "did you mean everest"),
        (["--measured", "none.json"], 2, "none.json: cannot be read as JSON"),
        (["--measured", "other.json"], 2, "not a measurement in this version's format"),
        (["--measured", "empty.json"], 2, "holds no measurement"),
        (["no-such-run"], 5, "no metrics.jsonl"),
        (["silent"], 5, "no training step is logged yet"),
        (["--tables", "k400", "--models", "MViT-B", "--out", "other.json"], 2, "cannot write the report"),
    ],
)
def test_a_mistake_gets_one_line_and_a_code(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    from everest_ds.efficiency.measured import PROFILE_FORMAT

    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text(json.dumps({"format": "everest-ds profile, format 0"}))
    Path("empty.json").write_text(json.dumps({"format": PROFILE_FORMAT, "measured": None}))
    write_run(tmp_path / "silent", [])
    assert run_main(monkeypatch, "report", *arguments) == code
    error = capsys.readouterr().err
    assert says in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_last_clip_that_a_run_drew_is_in_its_report(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "seen", [step(1, 10.0, 2.0)])
    (run / "tensorboard").mkdir()
    imsave(run / "tensorboard" / "attention.png", np.zeros((4, 6, 3), np.uint8))
    assert run_main(monkeypatch, "report", str(run), "--out", str(tmp_path / "report")) == 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert 'viewBox="0 0 6 4"><image' in page and "seen: Attention rollout" in page
