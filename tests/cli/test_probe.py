"""Tests of the command `probe`: over the checkpoints of a run, from its cache, and its errors."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everest_ds import load_model, read_clip
from everest_ds.checkpoints.names import BEST_WEIGHTS_FILE
from everest_ds.checkpoints.tensor_file import save_weights
from everest_ds.config import Experiment, dump_experiment
from everest_ds.errors import ExitCode
from everest_ds.models import build_model
from everest_ds.probing import attentive_probe, feature_cache
from everest_ds.probing.frozen_encoder import GridFeatures
from tests.cli.test_cli import run_main
from tests.training.runs import experiment


@pytest.fixture(autouse=True)
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentive_probe, "_STEPS_AT_LEAST", 1)


@pytest.fixture
def weights(motion_data: Path, tmp_path: Path) -> Path:
    return saved(experiment(motion_data, tmp_path / "pre"))


def saved(config: Experiment) -> Path:
    """Return the folder of a run that holds its config and initial weights only."""
    folder = config.run.dir
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_experiment(config))
    torch.manual_seed(0)
    tensors = {name: parameter.detach() for name, parameter in build_model(config).named_parameters()}
    save_weights(tensors, folder / BEST_WEIGHTS_FILE, {})
    return folder


def probe(monkeypatch: pytest.MonkeyPatch, source: Path, *words: str) -> dict[str, Any]:
    out = source.parent / "out.json"
    assert run_main(monkeypatch, "probe", str(source), "--workers", "0", "--json", str(out), *words) == 0
    (row,) = json.loads(out.read_text())["weights"]
    return dict(row)


def test_the_grid_holds_the_means_of_the_tokens_of_its_cells(weights: Path, motion_data: Path) -> None:
    for tokens in (["tokens.selection=none"], ["tokens.selection=rero", "tokens.keep_ratio=0.3"]):
        model = load_model(weights, *tokens, features=True)
        batch = read_clip(motion_data / "test/00001.mp4", model.config)
        with torch.no_grad():
            found = GridFeatures(model)(batch.clip, batch.key)[0]
            x, keep = (part[0] for part in model.tokens(batch.clip, batch.key))
            torch.testing.assert_close(found[0], model(batch.clip, batch.key)[0])
        size, cells = 4, found[1:].reshape(2, 2, 2, -1)  # slots, rows, columns
        for slot, row, column in np.ndindex(2, 2, 2):
            inside = [
                x[number]
                for number, token in enumerate(keep.tolist())
                if (token // 16, token % 16 // size * 2 // size, token % size * 2 // size)
                == (slot, row, column)
            ]
            expected = torch.stack(inside).mean(dim=0) if inside else torch.zeros(x.shape[1])
            torch.testing.assert_close(cells[slot, row, column], expected, rtol=1e-4, atol=1e-5)


def test_a_second_call_reads_the_cache_and_an_interrupted_one_resumes(
    weights: Path, motion_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_cache, "_PART", 8)
    encoded: list[int] = []
    over_views = feature_cache.over_views

    def spy(model: Any, samples: Any, *rest: Any) -> Any:
        for row in over_views(model, samples, *rest):
            if len(encoded) == 20:
                encoded.append(-1)
                raise KeyboardInterrupt
            encoded.append(row[0])
            yield row

    monkeypatch.setattr(feature_cache, "over_views", spy)
    assert run_main(monkeypatch, "probe", str(weights), "--workers", "0") != 0
    first = probe(monkeypatch, weights)
    assert len(encoded) == 21 + (24 - 16) + 12  # two of the three parts of the training set were complete
    assert probe(monkeypatch, weights) == first and len(encoded) == 41
    shutil.rmtree(weights / "probe")
    assert probe(monkeypatch, weights) == first and len(encoded) == 41 + 36
    assert (weights / "probe/probe.png").read_bytes().startswith(b"\x89PNG")
    probe(monkeypatch, weights, "tokens.selection=rero")  # other tokens, so other features
    assert len(encoded) == 41 + 36 + 36


def test_a_fine_tuned_classifier_is_probed_on_a_part_of_a_single_manifest(
    motion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(experiment(motion_data, tmp_path / "fine", "finetune"))
    rows = tmp_path / "rows.csv"
    row = probe(monkeypatch, run, "--train", str(motion_data / "train.txt"), "--csv", str(rows))
    # A class has four clips, too few to hold out every fifth, so every second is.
    assert row["test_clips"] == 12 and row["linear_low"] <= row["linear_top1"] <= row["linear_high"]
    with open(rows, newline="") as stream:
        assert [line["weights"] for line in csv.DictReader(stream)] == ["fine"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{video}\n", "no label"),
        ("{video} 3\n" * 4, "a probe needs clips of two or more classes; given: 4 clips, all of class 3"),
    ],
)
def test_a_manifest_without_classes_is_named(
    weights: Path,
    motion_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: str,
    message: str,
) -> None:
    manifest = weights.parent / "list.txt"
    manifest.write_text(lines.format(video=motion_data / "test/00000.mp4"))
    assert run_main(monkeypatch, "probe", str(weights), "--train", str(manifest)) == ExitCode.DATA
    assert str(manifest) in (said := capsys.readouterr().err) and message in said


def test_other_files_and_missing_sets_are_refused(
    tmp_path: Path, motion_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.safetensors").write_text("no weights")
    for name in ("a.safetensors", "absent"):
        assert run_main(monkeypatch, "probe", str(tmp_path / name)) == ExitCode.CHECKPOINT
        assert name in capsys.readouterr().err
    bare = saved(experiment(motion_data, tmp_path / "bare", data={"train": None}))
    assert run_main(monkeypatch, "probe", str(bare)) == ExitCode.USAGE
    assert "--train" in capsys.readouterr().err
    assert run_main(monkeypatch, "probe", str(bare), "--test", "x.txt") == ExitCode.USAGE
