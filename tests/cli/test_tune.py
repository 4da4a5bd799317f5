"""Tests of `everest-ds tune` as a user types it: the table, the files of the winner, and the refusals."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest

from everest_ds.config import load_experiment
from everest_ds.errors import ConfigError
from everest_ds.tuning.winner import check_written
from tests.cli.test_cli import run_main

RECIPE = "k400_pretrain_vit_base"
HUGE = (RECIPE, "model.backbone=vit_huge", "--gpus", "8", "--gpu", "h100-80gb")


def tune(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, Any]:
    """Run `everest-ds tune *arguments --json` with its files in `folder`; return the JSON that it writes."""
    file = folder / "tune.json"
    code = run_main(monkeypatch, "tune", *arguments, "--out", str(folder / "out"), "--json", str(file))
    assert code == 0
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_the_winner_is_written_as_a_config_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = tune(monkeypatch, tmp_path, *HUGE, "--global-batch", "1024", "--explain", "1", "--top", "3")
    best, file = found["candidates"][0], tmp_path / "out" / "winner.yaml"
    config = load_experiment(file)
    expected = load_experiment(RECIPE, ["model.backbone=vit_huge", *best["overrides"]])
    assert config == expected and config.batch.global_batch_size == 1024
    # The file holds only what differs from its base.
    assert file.read_text().count("backbone") == 1 and "schedule" not in file.read_text()
    tree = json.loads((tmp_path / "out" / "deepspeed.json").read_text())
    assert tree["zero_optimization"]["stage"] == config.parallelism.zero_stage
    said = capsys.readouterr().out
    command = said[said.index("  everest-ds submit") :].replace("\\\n", " ").split()
    assert command[:4] == ["everest-ds", "submit", "pretrain", str(file)]
    assert command[4:] == ["data.num_workers=14", "--nodes", "1", "--gpus-per-node", "8"]
    for heading in ("Tuning by prediction", "Families left out", "encoder forward", "depth · (12·n·D²"):
        assert heading in said
    assert "candidate 1 waits for clips" in said and "decoding binds" in said and "(predicted)" in said


def test_rows_add_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    costs = ("--clips", "240000", "--price-per-gpu-hour", "2", "--price-per-kwh", "0.3")
    table = tmp_path / "rows.csv"
    found = tune(monkeypatch, tmp_path, *HUGE, "data.num_workers=14", *costs, "--csv", str(table))
    assert found["cluster"]["ranks"] == 8
    for row in found["candidates"]:
        assert sum(row["split_s"].values()) == pytest.approx(row["step_s"])
        parts = [size for part, size in row["memory_bytes"].items() if part != "needed"]
        assert sum(parts) == row["memory_bytes"]["needed"]
        assert row["clips/s"] == pytest.approx(256 / row["step_s"], abs=0.1)
    best = found["candidates"][0]
    hours = 800 * (240_000 // 256) * best["step_s"] / 3600
    assert best["GPUs_cost"] == pytest.approx(2 * 8 * hours, rel=1e-3)
    assert best["energy_cost"] == pytest.approx(0.3 * 8 * 0.7 * hours, rel=1e-3)  # 700 W
    assert found["candidates"] == sorted(found["candidates"], key=lambda row: row["step_ms"])
    with table.open() as stream:
        assert [row["rank"] for row in csv.DictReader(stream)] == [
            str(row["rank"]) for row in found["candidates"]
        ]


def test_the_table_is_the_golden_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The candidates kept and left out are unchanged for scarce memory; other tests check the times."""
    words = "k400_finetune_vit_base model.backbone=vit_huge data.num_workers=14 --gpus 4 --gpu a10"
    found = tune(monkeypatch, tmp_path, *words.split())
    columns = ("rank", "sharding", "recompute", "micro_x_accum", "GiB", "free_%")
    lines = [" | ".join(str(row[name]) for name in columns) for row in found["candidates"][:12]]
    lines += [f"not {row['family']}: {row['why_not']}" for row in found["dropped"]]
    file, text = Path(__file__).parent / "golden" / "tune.txt", "\n".join(lines) + "\n"
    if os.environ.get("ACCEPT_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text(), f"if this is meant: ACCEPT_GOLDEN=1 pytest {Path(__file__).name}"


def test_buckets_of_its_own_come_as_a_deepspeed_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Larger buckets, which save latency on many nodes, come in a DeepSpeed file of the winner's own."""
    arguments = ("data.num_workers=14", "--global-batch", "1024", "--interconnect", "ethernet-100")
    found = tune(monkeypatch, tmp_path, *HUGE[:2], *arguments, "--gpus", "64", "--gpu", "h100-80gb")
    best = found["candidates"][0]
    config = load_experiment(tmp_path / "out" / "winner.yaml")
    assert config.parallelism.ds_config == tmp_path / "out" / "deepspeed.json"
    tree = json.loads(config.parallelism.ds_config.read_text())
    assert tree["zero_optimization"]["reduce_bucket_size"] == best["reduce_bucket_size"] == 200_000_000


def test_a_winner_keeps_the_entries_of_the_users_own_deepspeed_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 4,  # neither agrees with the recipe, and both are searched
        "gradient_accumulation_steps": 32,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": "auto"}},
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 2e7, "offload_param": {"device": "none"}},
        "wandb": {"enabled": True},
    }
    (tmp_path / "mine.json").write_text(json.dumps(own))
    recipe = (RECIPE, "schedule.base_lr=3e-4", "parallelism.zero_stage=3")
    tune(monkeypatch, tmp_path, *recipe, f"parallelism.ds_config={tmp_path / 'mine.json'}", "--gpu", "l40s")
    assert f"{tmp_path / 'mine.json'}: ignored, because" in capsys.readouterr().out.replace("\n", "")
    config = load_experiment(tmp_path / "out" / "winner.yaml")
    assert config.parallelism.ds_config == tmp_path / "out" / "deepspeed.json"
    assert config.batch.micro_batch_size != 4
    kept = json.loads(config.parallelism.ds_config.read_text())
    searched = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    decided = {"train_batch_size": "auto", "bf16": {"enabled": "auto"}}
    adam = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto"}}
    assert kept == own | searched | decided | {"optimizer": adam}
    check_written(tmp_path / "out" / "winner.yaml", 1)


def test_a_deepspeed_file_is_refused_before_the_search(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    own = {"train_batch_size": 128, "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}}
    Path("mine.json").write_text(json.dumps(own))
    arguments = ("parallelism.ds_config=mine.json", "--gpus", "2", "--gpu", "l40s")
    assert run_main(monkeypatch, "tune", RECIPE, *arguments) == 2
    out, error = capsys.readouterr()
    changes = "batch.global_batch_size=128 parallelism.zero_stage=1"
    assert error.startswith("error: mine.json: 2 entries") and error.strip().endswith(changes)
    assert "candidates" not in out and not Path("tuned").exists()
    assert run_main(monkeypatch, "tune", RECIPE, *arguments, *changes.split()) == 0


def test_a_base_that_is_a_file_is_found_from_the_winner(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(f"base: {RECIPE}\nmodel: {{backbone: vit_small}}\n")
    tune(monkeypatch, tmp_path, str(own), "--gpus", "2", "--gpu", "l40s")
    winner = load_experiment(tmp_path / "out" / "winner.yaml")
    assert winner.model.backbone == "vit_small" and winner.batch.global_batch_size == 256


def test_what_deepspeed_would_refuse_is_refused_when_it_is_written(tmp_path: Path) -> None:
    zero = {"stage": 1, "reduce_bucket_size": 0}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    (tmp_path / "winner.yaml").write_text(
        f"base: {RECIPE}\nparallelism: {{zero_stage: 1, ds_config: {tmp_path / 'zero.json'}}}\n"
    )
    with pytest.raises(ConfigError, match="reduce_bucket_size` is 0, not a whole number from 1"):
        check_written(tmp_path / "winner.yaml", 8)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--gpu h1000", "did you mean H100"),
        ("--gpu a100", "matches several products; given: 'a100'; allowed: A100 40GB"),
        (
            "--gpu h200 --gpus 12 --nodes 5",
            "--gpus 12 is not a multiple of --nodes 5; allowed: --nodes 1, 2, 3, 4, 6, 12",
        ),
        ("--gpu h200 --gpus 16 --interconnect ib-ndrr", "did you mean ib-ndr"),
        ("--gpu h200 --gpus 48", "cannot be split over the ranks; given: 256 clips, 48 ranks"),
        ("--gpu h200 --explain 99", "--explain 99: there is no such candidate; allowed: 1 to "),
        ("--gpu nowhere.yaml", "nowhere.yaml: not readable"),
        ("--gpu h200 precision=fp8", "'fp32', 'tf32', 'bf16' or 'fp16'"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, "tune", RECIPE, *arguments.split()) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and error.startswith("error: ") and "\n" not in error
    assert not (tmp_path / "tuned").exists()
