"""The signal matrix on a cluster: after every signal the run is saved, and the job requeues itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.signals.cases import ACCUMULATION, Case
from tests.signals.live import KINDS, Start, make_data, rank_process, undisturbed, write_recipe
from tests.signals.report import Row
from tests.slurm.cluster import SCRIPTS, Job, LocalCluster, Run, wait_for
from tests.training.runs import losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(7200)]


def send(case: Case, job: Job, run: Path) -> None:
    """Send the signal of a case to its target."""
    if case.target == "one rank":
        os.kill(rank_process("SLURM_PROCID=1", run), case.number)
    else:
        batch = ["--batch"] if case.target == "batch shell" else []
        job.cluster.slurm("scancel", *batch, f"--signal={case.number.name}", job.number)


def suffer(case: Case, cluster: LocalCluster, recipe: Path) -> Row:
    """Submit the run, send the signal in the phase of the case, and check that the job continues."""
    run, start = Run(recipe.parent / "run"), Start.now(recipe.parent / "run")
    job = cluster.submit(SCRIPTS / "finetune.sbatch", str(recipe), f"data.num_workers={case.workers}")
    wait_for(lambda: run.events(job, "started"), "started")
    start.wait_for(case.phase, lambda: None)
    sent = time.monotonic()
    send(case, job, run.path)
    wait_for(lambda: run.events(job, "requeued"), f"{case}: requeued\n{job.output}")
    stopped = time.monotonic()
    start.check_stopped(case, job.output)
    run.steps_beyond(job, 1)
    again = time.monotonic()
    (run.path / "kill").touch()
    job.wait("FAILED")  # exit code 75: stopped on request
    job.ended_everywhere()
    return Row(case, stopped - sent, again - sent)


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("kind", sorted(set(KINDS.values())))
def test_no_signal_costs_a_step_or_the_job(
    kind: str,
    accumulation: int,
    cluster: LocalCluster,
    work: Path,
    slurm_cases: list[Case],
    signal_rows: list[Row],
) -> None:
    folder = work / f"signals-{kind}-{accumulation}"
    recipe = write_recipe(make_data(folder / "data", kind), folder, kind, accumulation)
    cases = [c for c in slurm_cases if KINDS[c.phase] == kind and c.accumulation == accumulation]
    assert cases
    for case in cases:
        signal_rows.append(suffer(case, cluster, recipe))
    done = losses(folder / "run")
    assert done == undisturbed(recipe, max(done))
