"""Tests of `everest-ds tune --trials --sbatch`: an array job runs the trials; a second call reads them."""

from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.config import load_experiment
from everest_ds.tuning.trials.record import read_trials
from tests.slurm.cluster import LocalCluster, wait_for
from tests.slurm.test_submit import everest
from tests.tuning.calibrated import pretend_calibration

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


def test_trials_are_an_array_job_that_the_same_command_reads(
    cluster: LocalCluster, recipe: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(work / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the cluster's commands use the same number
    pretend_calibration(1)
    out = work / "tuned here"
    command = [
        "tune",
        str(recipe),
        "--gpus=1",
        "--trials=1",
        "--trial-steps=6",
        "--sbatch=--time=10",
        f"--out={out}",
    ]
    said = everest(cluster, *command)
    assert "sweep: job" in said and "run the same command again to read their results" in said
    assert not (out / "winner.yaml").exists()

    def all_over() -> bool:
        return not cluster.slurm("squeue", "-h", "--states=PD,R,CG", "-o", "%j").strip()

    wait_for(all_over, "the trials", 200)
    said = everest(cluster, *command)
    trials = read_trials(out)
    assert {trial.outcome for trial in trials.values()} == {"measured"} and len(trials) >= 2, trials
    assert "best of the trials" in said and (out / "report.html").is_file()
    assert load_experiment(out / "winner.yaml").batch.global_batch_size == 8
    assert "sweep: job" not in said
