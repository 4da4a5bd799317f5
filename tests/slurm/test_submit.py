"""Tests of `everest-ds submit | jobs | logs | cancel | requeue | sweep` with jobs of a local cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from everest_ds.config import dump_experiment, load_experiment
from everest_ds.errors import ExitCode
from tests.slurm.cluster import Job, LocalCluster, Run, wait_for
from tests.training.runs import experiment

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

# Characters that a shell, SLURM's file names, YAML or a terminal could each interpret.
HOSTILE = 'it\'s $(touch gotcha) `touch gotcha`; "quo\\ted" &\n%j | > [b] ü'
SHORT = ("schedule.epochs=2",)  # 6 steps


def everest(cluster: LocalCluster, *arguments: str, code: int = 0, **variables: str) -> str:
    """Run `everest-ds` in the current folder; return its output."""
    command = [sys.executable, "-m", "everest_ds", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**cluster.variables, **variables}, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def jobs_of(cluster: LocalCluster, folder: Path) -> list[dict[str, Any]]:
    """Return the rows of `everest-ds jobs` for a folder."""
    everest(cluster, "jobs", str(folder), "--json", "jobs.json")
    rows: list[dict[str, Any]] = json.loads(Path("jobs.json").read_text())
    return rows


def until(cluster: LocalCluster, folder: Path, *states: str) -> list[dict[str, Any]]:
    """Wait until no submitted job is live, check the job states below `folder`, and return the rows."""

    def all_over() -> bool:
        names = cluster.slurm("squeue", "-h", "--states=PD,R,CG", "-o", "%j").splitlines()
        return not any(name.startswith("everest-") for name in names)

    wait_for(all_over, f"jobs {states}", 300)
    rows = jobs_of(cluster, folder)
    assert [row["state"] for row in rows] == list(states), json.dumps(rows, indent=1)
    return rows


def test_hostile_names_reach_the_trainer_unchanged_through_a_whole_chain(
    cluster: LocalCluster, recipe: Path, motion_data: Path, work: Path
) -> None:
    home = work / f"home {HOSTILE}"
    home.mkdir()
    size = {"backbone": "vit_tiny", "image_size": 16, "patch_size": 8, "num_frames": 4}
    tuned = experiment(motion_data, Path("unnamed"), "finetune", model=size, data={"num_workers": 0})
    (home / f"pre {HOSTILE}").write_text(recipe.read_text())
    (home / f"fine {HOSTILE}").write_text(dump_experiment(tuned))
    runs = [home / f"{stage} run {HOSTILE}" for stage in ("pre", "fine")]
    folders = [
        f"{stage}.run.dir={json.dumps(str(run))}"
        for stage, run in zip(("pretrain", "finetune"), runs, strict=True)
    ]
    recipes = [str(home / f"{stage} {HOSTILE}") for stage in ("pre", "fine")]
    short = ["schedule.epochs=2", "schedule.warmup_epochs=1"]
    everest(cluster, "submit", "chain", *recipes, *short, *folders, "--ntasks-per-node=1", "--nodes=2")
    rows = until(cluster, home, *["finished"] * 4)
    assert [row["task"] for row in rows] == ["pretrain", "finetune", "evaluate", "report"]
    assert [row["run"] for row in rows] == [str(run) for run in (runs[0], *[runs[1]] * 3)]
    assert load_experiment(runs[1]).model.init_from == runs[0]
    assert yaml.safe_load((runs[0] / "config.yaml").read_text())["run"]["dir"] == str(runs[0])
    assert rows[0]["progress"]["step"] == 6 and rows[2]["progress"]["top1"] is not None
    assert (runs[1] / "report" / "report.html").is_file()
    assert "step 6/6" in everest(cluster, "logs", str(runs[0]), "--job")
    assert not list(work.rglob("gotcha")) and not list(Path.cwd().rglob("gotcha"))


def test_a_sweep_is_one_table_and_a_failed_run_a_row_of_it(
    cluster: LocalCluster, recipe: Path, work: Path
) -> None:
    sweep = work / f"sweep {HOSTILE}"
    rows = [
        {"name": f"good {HOSTILE}", "overrides": ["run.seed=1"]},
        {"name": "nan", "overrides": ["schedule.base_lr=1e30", "schedule.warmup_epochs=0"]},
    ]
    Path("candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = f"run.dir={json.dumps(str(sweep))}"
    options = ["--candidates", "candidates.jsonl", "--ntasks-per-node=1", "--wait"]
    # The site exports nothing by default, and the user's Python greets on stdout.
    greeting = Path("greeting python")
    greeting.write_text(f'#!/bin/bash\nprintf "Welcome"\nexec {sys.executable} "$@"\n')
    greeting.chmod(0o755)
    site = {"SBATCH_EXPORT": "PYTHONPATH,PATH", "EVEREST_PYTHON": str(greeting.absolute())}
    diverged = ExitCode.DIVERGED
    said = everest(cluster, "submit", "sweep", str(recipe), folder, *SHORT, *options, code=diverged, **site)
    assert "sweep: job " in said
    until(cluster, sweep, "finished", "diverged")
    everest(cluster, "sweep", str(sweep), "--json", "sweep.json")
    table = json.loads(Path("sweep.json").read_text())
    assert [(row["run"], row["state"]) for row in table] == [
        (rows[0]["name"], "finished"),
        ("nan", "diverged"),
    ]
    assert table[0]["run.seed"] == "1" and table[0]["step"] == 6 and table[1]["reason"]


def test_a_job_runs_where_a_site_exports_nothing(cluster: LocalCluster, recipe: Path, work: Path) -> None:
    words = ["pretrain", str(recipe), f"run.dir={work / 'bare'}", "run.max_steps=1", "--ntasks-per-node=1"]
    everest(cluster, "submit", *words, "--wait", SBATCH_EXPORT="NONE")
    assert [row["state"] for row in jobs_of(cluster, work / "bare")] == ["finished"]


def test_a_run_is_requeued_cancelled_and_submitted_again(
    cluster: LocalCluster, recipe: Path, work: Path
) -> None:
    run = Run(work / "steered")
    everest(cluster, "submit", "pretrain", str(recipe), f"run.dir={run.path}", "--ntasks-per-node=1")
    first = Job(cluster, jobs_of(cluster, run.path)[0]["job"])
    run.steps_beyond(first, 0, 2)
    assert "loss" in everest(cluster, "logs", str(run.path))
    assert "requeued" in everest(cluster, "requeue", str(run.path))
    run.steps_beyond(first, 1, 2)
    (row,) = jobs_of(cluster, run.path)
    assert row["state"] == "running" and row["restarts"] == 1 and 0 < row["progress"]["loss"] < 2
    assert "saves at its next step" in everest(cluster, "cancel", str(run.path))
    (row,) = until(cluster, run.path, "stopped")
    assert row["next"].startswith("`everest-ds requeue")
    assert "submitted again as job" in everest(cluster, "requeue", str(run.path))
    row = jobs_of(cluster, run.path)[-1]
    second = Job(cluster, row["job"])
    _, resumed_from = run.steps_beyond(second, 0)
    assert second.number != first.number and resumed_from > 0
    everest(cluster, "cancel", "--now", str(run.path))
    until(cluster, run.path, "cancelled")
    wait_for(lambda: not second.processes(), "no process left", 60)


@pytest.fixture
def chain(recipe: Path, motion_data: Path, work: Path) -> list[str]:
    """Return a `submit chain` command for the runs `earlier` and `later`."""
    size = {"backbone": "vit_tiny", "image_size": 16, "patch_size": 8, "num_frames": 4}
    config = experiment(motion_data, work / "later", "finetune", model=size)
    (work / "later.yaml").write_text(dump_experiment(config))
    recipes = [str(recipe), str(work / "later.yaml")]
    return ["submit", "chain", *recipes, f"pretrain.run.dir={work}/earlier", "--ntasks-per-node=1"]


def test_what_is_unfinished_of_a_run_is_submitted_again_in_its_order(
    cluster: LocalCluster, chain: list[str], work: Path
) -> None:
    everest(cluster, *chain, "--hold")
    everest(cluster, "cancel", "later", "earlier")
    assert [row["state"] for row in jobs_of(cluster, work / "later")] == ["cancelled"] * 3
    everest(cluster, "requeue", "later")
    rows = jobs_of(cluster, work / "later")
    waits = [cluster.slurm("squeue", "-h", "-j", row["job"], "-o", "%E").strip() for row in rows]
    everest(cluster, "cancel", "later")
    assert [row["task"] for row in rows] == ["finetune", "evaluate", "report"]
    tuned, tested, _ = (row["job"] for row in rows)
    assert f"afterok:{tuned}" in waits[1]
    assert f"afterok:{tuned}" in waits[2] and f"afterany:{tested}" in waits[2]


def test_a_dry_run_has_slurms_word_and_a_refusal_leaves_nothing_queued(
    cluster: LocalCluster, chain: list[str]
) -> None:
    words = chain
    assert "to start at" in everest(cluster, *words, "--dry-run")
    refused = everest(cluster, *words, "--partition=no-such-partition", code=2)
    assert "sbatch failed; given: sbatch: error: " in refused and "partition" in refused
    assert "no-such-partition" in everest(cluster, *words, "--partition=no-such-partition", "--dry-run")
    assert not cluster.slurm("squeue", "-h", "--name=everest-pretrain-earlier")
