"""Tests that run folders made before the package was rearranged are still resumed, read and built on.

The archive holds the data, two stopped runs (2 of 4 steps, 2 ranks, ZeRO stage 1) and the losses of the same
runs without a stop. Its `make.py` made all of them with the code of commit 4f630ba.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.config import Experiment, load_experiment
from everest_ds.config.backbones import BACKBONES, Backbone, TransformerShape
from everest_ds.parallel.world import World
from everest_ds.training.evaluate import run_test
from everest_ds.training.loop import train
from everest_ds.training.run_folder import read_metrics
from tests.cli.test_cli import run_main
from tests.ranks import run_ranks
from tests.training.runs import losses

ARCHIVE = Path(__file__).parent / "run_of_4f630ba.tar.xz"
# The weights and moments of the smallest shipped backbone would take 10 MB.
SMALL = Backbone(TransformerShape(16, 1, 2), TransformerShape(16, 1, 2))


@pytest.fixture
def old_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked archive, as the working folder."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(BACKBONES, "vit_tiny", SMALL)
    return tmp_path


def resume(world: World, folder: Path, config: Experiment) -> None:
    enter(folder)
    train(config, world)


def evaluate(world: World, folder: Path, config: Experiment) -> dict[str, Any]:
    enter(folder)
    return run_test(config, world)


def enter(folder: Path) -> None:
    """Prepare a rank: ranks are forked before the test changes its working folder and the backbone."""
    os.chdir(folder)
    BACKBONES["vit_tiny"] = SMALL


def assert_same_losses(found: dict[int, float], task: str) -> None:
    """Compare with the recorded losses: bit for bit on the kind of processor that computed them."""
    recorded = json.loads(Path("losses.json").read_text())
    expected = {int(step): loss for step, loss in recorded[task].items()}
    if recorded["machine"] == this_machine():
        assert found == expected
    else:
        assert found == pytest.approx(expected, rel=1e-5)


def this_machine() -> list[str]:
    processor = next(line for line in open("/proc/cpuinfo") if line.startswith("vendor_id"))
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), processor.split()[-1]]


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_an_old_run_resumes_bit_for_bit(old_runs: Path, task: str) -> None:
    config = load_experiment(Path(task, "config.yaml"))
    run_ranks(resume, 2, old_runs, config)
    assert_same_losses(losses(Path(task)), task)
    log = Path(task, "logs", "rank-0.log").read_text()
    assert f"resuming from {task}/checkpoints/step-00000002" in log
    assert log.count("step 1/4") == log.count("step 2/4") == 1, "steps before the stop were repeated"


def test_fine_tuning_starts_from_an_old_pre_training_run(old_runs: Path) -> None:
    shutil.rmtree("finetune")
    run_ranks(resume, 2, old_runs, load_experiment(Path("finetune.yaml")))
    assert_same_losses(losses(Path("finetune")), "finetune")


def test_an_old_run_is_evaluated_listed_and_reported(
    old_runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads(Path("finetune/evaluation.json").read_text())
    config = load_experiment(Path("finetune"))
    assert run_ranks(evaluate, 1, old_runs, config) == [before]

    assert run_main(monkeypatch, "jobs", "pretrain", "finetune", "--json", "jobs.json") == 0
    rows = json.loads(Path("jobs.json").read_text())
    assert [(row["state"], row["progress"]["step"]) for row in rows] == [("stopped", 2)] * 2
    assert run_main(monkeypatch, "checkpoint", "verify", "pretrain") == 0
    assert run_main(monkeypatch, "report", "pretrain", "finetune", "--out", "report") == 0, (
        capsys.readouterr().err
    )
    cells = {
        (row["method"], row["column"]): row["value"]
        for row in json.loads(Path("report/report.json").read_text())
    }
    assert cells["finetune", "top1"] == before["top1"]
    assert cells["pretrain", "loss"] == pytest.approx(read_metrics(Path("pretrain"))[-1]["loss"], abs=1e-4)
