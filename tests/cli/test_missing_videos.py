"""Tests of evaluate, features and predict on broken videos: all are named, and the exit code is not 0."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from everest_ds.checkpoints.names import BEST_WEIGHTS_FILE
from everest_ds.checkpoints.tensor_file import save_weights
from everest_ds.config import Experiment
from everest_ds.errors import EverestError, ExitCode
from everest_ds.launch.environment import free_port
from everest_ds.models import build_model
from everest_ds.parallel.world import World, leave_world
from tests.cli.test_cli import run_main
from tests.interchange import systems
from tests.interchange.systems import CLIP
from tests.ranks import run_ranks
from tests.training.runs import experiment

_BROKEN = ("cut.mp4", "gone.mp4", "text.mp4")


@pytest.fixture
def manifest(motion_data: Path, tmp_path: Path) -> Path:
    """Return a manifest of nine videos, three of which are cut off, absent and no videos at all."""
    good = [line.split() for line in (motion_data / "test.txt").read_text().splitlines()[:6]]
    whole = (motion_data / good[0][0]).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "text.mp4").write_text("no video")
    lines = [f"{motion_data / video} {label}" for video, label in good]
    for place, name in zip((0, 4, 8), _BROKEN, strict=True):
        lines.insert(place, f"{tmp_path / name} 1")
    (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path / "list.txt"


def evaluate_as_command(world: World, config: Experiment, port: int, json_file: Path) -> tuple[int, str]:
    """Run the command `evaluate` on this rank, and return its exit code and error."""
    from everest_ds.cli.ranks import evaluate_as_rank

    leave_world()
    os.environ["MASTER_PORT"] = str(port)
    try:
        evaluate_as_rank(config, json_file)
    except EverestError as error:
        return error.exit_code, str(error)
    return 0, ""


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_evaluate_names_what_its_results_lack(manifest: Path, tmp_path: Path, num_ranks: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    config = experiment(
        manifest.parent, run, "finetune", data={"test": str(manifest), "num_workers": 2, "class_names": None}
    )
    weights = {name: parameter.detach() for name, parameter in build_model(config).named_parameters()}
    save_weights(weights, run / BEST_WEIGHTS_FILE, {})
    ends = run_ranks(evaluate_as_command, num_ranks, config, free_port(), tmp_path / "found.json")
    for code, text in ends:
        assert code == ExitCode.DATA
        assert text.startswith(f"{manifest}: the results lack 3 of 9 videos; given: {tmp_path}/")
    for file in (tmp_path / "found.json", run / "evaluation.json"):
        found = json.loads(file.read_text())
        assert {Path(name).name for name in found["missing"]} == set(_BROKEN)
        assert (found["num_clips"], found["num_missing"]) == (6, 3)


def run_on_manifest(
    monkeypatch: pytest.MonkeyPatch, folder: Path, command: str, *more: str
) -> dict[str, Any]:
    """Run a command on the manifest with two loader workers, and return its JSON."""
    weights = folder / "a.pth"
    torch.save(systems.finetuned_state(systems.classifier()), weights)
    out = folder / "found.json"
    words = [command, str(folder / "list.txt"), "--model", str(weights), *CLIP, "data.frame_stride=2"]
    assert run_main(monkeypatch, *words, "--workers", "2", "--json", str(out), *more) == ExitCode.DATA
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def names_of(problems: Sequence[dict[str, str]]) -> list[str]:
    return sorted(Path(row["video"]).name for row in problems)


def test_predict_names_what_it_could_not_read(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], manifest: Path, tmp_path: Path
) -> None:
    first = next(
        line for line in manifest.read_text().splitlines() if "gone" not in line and "cut" not in line
    )
    manifest.write_text(manifest.read_text() + f"{first}\n")  # asked for twice
    found = run_on_manifest(monkeypatch, tmp_path, "predict", "--csv", str(tmp_path / "rows.csv"))
    assert names_of(found["problems"]) == sorted(_BROKEN)
    assert "3 of 10 videos cannot be read" in capsys.readouterr().out
    with open(tmp_path / "rows.csv", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 7


def test_features_names_what_it_could_not_read(
    monkeypatch: pytest.MonkeyPatch, manifest: Path, tmp_path: Path
) -> None:
    table = tmp_path / "rows.npz"
    for known in (0, 6):  # the second time, the ledger of the table knows the damaged videos
        found = run_on_manifest(monkeypatch, tmp_path, "features", "--out", str(table))
        assert names_of(found["problems"]) == sorted(_BROKEN)
        assert (found["videos"], found["there_already"], found["left_out"]) == (6, known, 3)
        assert len(np.load(table)["features"]) == 6
