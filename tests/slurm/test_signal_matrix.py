"""The signal matrix on a cluster: after every signal the run is saved, and the job requeues itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from everest_ds.jobs.events import JobEvent
from tests.signals.cases import ACCUMULATION, Case
from tests.signals.live import KINDS, Start, make_data, rank_process, undisturbed, write_recipe
from tests.signals.report import Row, SignalReport
from tests.slurm.cluster import FINAL_STATES, SCRIPTS, Job, LocalCluster, Run, wait_for
from tests.training.runs import losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(7200)]


def send(case: Case, job: Job, run: Path) -> None:
    """Send the signal of a case to its target."""
    if case.target == "one rank":
        os.kill(rank_process("SLURM_PROCID=1", run), case.number)
    else:
        batch = ["--batch"] if case.target == "batch shell" else []
        job.cluster.slurm("scancel", *batch, f"--signal={case.number.name}", job.number)


def suffer(case: Case, job: Job, restarts: int, run: Run) -> Row:
    """Send the signal in the phase of the case to one start of the job, and measure how that start ends."""
    start = Start.now(run.path)

    def of_this_start(kind: str) -> list[JobEvent]:
        return [event for event in run.events(job, kind) if event.restarts == restarts]

    wait_for(lambda: of_this_start("started"), f"{case}: start {restarts}")
    start.wait_for(case.phase, lambda: None)
    sent = time.monotonic()
    send(case, job, run.path)
    ended = wait_for(lambda: of_this_start("requeued") or job.state in FINAL_STATES, f"{case}: the end")
    return start.measure(case, job.output, ended is not True, time.monotonic() - sent)


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("kind", sorted(set(KINDS.values())))
def test_no_signal_costs_a_step_or_the_job(
    kind: str,
    accumulation: int,
    cluster: LocalCluster,
    work: Path,
    slurm_cases: list[Case],
    signal_report: SignalReport,
) -> None:
    """A job is stopped by one signal after the other, and each time requeues itself and trains on."""
    cases = [c for c in slurm_cases if KINDS[c.phase] == kind and c.accumulation == accumulation]
    if not cases:
        pytest.skip("tried with --every-signal only")
    folder = work / f"signals-{kind}-{accumulation}"
    recipe = write_recipe(make_data(folder / "data", kind), folder, kind, accumulation)
    run = Run(folder / "run")
    for workers in sorted({case.workers for case in cases}):
        job = cluster.submit(SCRIPTS / "finetune.sbatch", str(recipe), f"data.num_workers={workers}")
        own = [case for case in cases if case.workers == workers]
        for restarts, case in enumerate(own):
            row = signal_report.add(suffer(case, job, restarts, run))
            assert row.harmless  # a job that has ended cannot suffer the next signal
        run.steps_beyond(job, len(own))
        (run.path / "kill").touch()
        job.wait("FAILED")  # exit code 75: stopped on request
        job.ended_everywhere()
    done = losses(run.path)
    assert done == undisturbed(recipe, max(done))
