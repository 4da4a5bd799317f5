"""Tests of `everest-ds tune --trials` and `--what-if` as a user types them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from everest_ds.config import dump_experiment, load_experiment
from everest_ds.tuning.trials.record import read_trials
from tests.cli.test_cli import run_main
from tests.training.runs import experiment
from tests.tuning.calibrated import pretend_calibration

GPU = ("--gpu", "h100-80gb")


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny recipe, on a machine that pretends to be calibrated."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    pretend_calibration(1, 2)
    config = experiment(tmp_path / "nowhere", tmp_path / "run", data={"num_workers": 0})
    (tmp_path / "tiny.yaml").write_text(dump_experiment(config))
    return tmp_path / "tiny.yaml"


@pytest.mark.slow
def test_trials_end_in_a_report_and_a_config_that_ran(
    recipe: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [
        sys.executable,
        "-m",
        "everest_ds",
        "tune",
        str(recipe),
        "--gpus=2",
        "--trials=1",
        "--trial-steps=6",
    ]
    subprocess.run(command, check=True)
    said = capfd.readouterr().out
    trials = read_trials(Path("tuned/tiny"))
    assert len(trials) >= 2 and {trial.outcome for trial in trials.values()} == {"measured"}
    assert "best of the trials" in said and "baseline: ZeRO-2" in said
    page = Path("tuned/tiny/report.html").read_text()
    assert "Predicted against measured" in page and page.count("<svg") == 3
    assert "![" in Path("tuned/tiny/report.md").read_text() and Path("tuned/tiny/plots/front.svg").is_file()
    assert load_experiment("tuned/tiny/winner.yaml").parallelism.tensor == 1
    written = Path("tuned/tiny/trials.jsonl").read_text()
    subprocess.run(command, check=True)
    assert Path("tuned/tiny/trials.jsonl").read_text() == written  # the second command runs no trial again


def test_trials_for_another_machine_are_not_run_on_this_one(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "tune", str(recipe), "--gpus", "2", *GPU, "--trials", "1") == 2
    said = capsys.readouterr().err
    assert "H100" in said and "--sbatch" in said and "Traceback" not in said


def test_what_if_is_a_page_over_1_to_1024_gpus(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = ("batch.global_batch_size=1024", "batch.micro_batch_size=1", "--what-if")
    assert run_main(monkeypatch, "tune", str(recipe), *large, "--gpus", "8", *GPU) == 0
    page = Path("tuned/tiny/what_if.md").read_text()
    assert "| 1024 |" in page and "| tensor degree | 2 |" in page
    assert "<svg" in Path("tuned/tiny/what_if.html").read_text()
