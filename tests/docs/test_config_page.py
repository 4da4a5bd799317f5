"""Tests of the list of config keys: complete, explained, and equal on the page and on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from config_page import PAGE, config_page

from everest_ds.config import flatten, load_experiment
from everest_ds.config.key_names import key_rows
from tests.cli.test_cli import run_main


def test_every_key_of_a_config_is_listed_once_with_its_meaning() -> None:
    rows = key_rows()
    dumped = load_experiment("demo_finetune").model_dump(mode="json")
    assert [row["key"] for row in rows] == [key for key, _ in flatten(dumped)]
    assert not [row["key"] for row in rows if not (row["meaning"] and row["values"])]
    known = {row["key"]: (row["values"], row["default"]) for row in rows}
    assert known["tokens.keep_ratio"] == ("number > 0 and ≤ 1", "0.3")
    assert known["parallelism.zero_stage"] == ("0, 1, 2, 3", "2")
    assert known["model.init_from"] == ("path or null", "null")
    assert known["optimizer.betas"] == ("list of 2: number ≥ 0 and < 1", "[0.9, 0.95]")
    assert known["task"] == ("pretrain, finetune", "(required)")


def test_the_page_is_that_of_the_schema() -> None:
    assert PAGE.read_text() == config_page(), "run: python tools/config_page.py"


def test_keys_are_found_by_words_of_their_names_and_meanings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run_main(monkeypatch, "keys", "warm-up", "epochs", "--json", str(tmp_path / "k.json")) == 0
    found = [row["key"] for row in json.loads((tmp_path / "k.json").read_text())]
    assert "schedule.warmup_epochs" in found and "schedule.warmup_lr" not in found
    assert "schedule.warmup_epochs" in capsys.readouterr().out
    assert run_main(monkeypatch, "keys", "epoch", "xyzzy") == 2
    assert "no config key has these words; given: epoch xyzzy" in capsys.readouterr().err
