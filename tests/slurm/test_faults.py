"""Tests of faults: a long run on two nodes resumes after each fault with unchanged losses.

Each test can run alone: it starts the run if none is live. Losses must equal those of an undisturbed run, bit
for bit.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPTS, Job, LocalCluster, Run, wait_for
from tests.slurm.conftest import NUM_STEPS
from tests.slurm.report import FaultTimes
from tests.training.runs import losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

SAVE_EVERY = 10


@dataclass
class LongRun:
    """The run that the faults hit, with a new folder for each job that it needs."""

    cluster: LocalCluster
    recipe: Path
    work: Path
    jobs: list[Job] = field(default_factory=list)

    @property
    def job(self) -> Job:
        return self.jobs[-1]

    @property
    def run(self) -> Run:
        return Run(self.work / f"suffering-{len(self.jobs)}")

    def live(self) -> None:
        """Make sure that a job trains and has steps left; start one if necessary."""
        if self.jobs and self.job.state == "RUNNING" and self.run.step < NUM_STEPS * 0.7:
            return
        if self.jobs:
            self.job.cancel()
        self.cluster.calm()
        folder = self.work / f"suffering-{len(self.jobs) + 1}"
        script = SCRIPTS / "pretrain.sbatch"
        self.jobs.append(self.cluster.submit(script, str(self.recipe), f"run.dir={folder}"))
        self.run.steps_beyond(self.job, 0, 3)


@pytest.fixture(scope="module")
def long_run(cluster: LocalCluster, recipe: Path, work: Path) -> Iterator[LongRun]:
    run = LongRun(cluster, recipe, work)
    yield run
    for job in run.jobs:
        job.cancel()
        job.ended_everywhere()


def signal_all_ranks(job: Job) -> None:
    job.cluster.slurm("scancel", "--signal=USR1", job.number)


def requeue(job: Job) -> None:
    job.cluster.slurm("scontrol", "requeue", job.number)


def preempt(job: Job) -> None:
    job.cluster.slurm(
        "sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"
    )


def crash_worker(job: Job) -> None:
    job.cluster.tool("crash", job.nodes[1])


def crash_batch_host(job: Job) -> None:
    job.cluster.tool("crash", job.nodes[0])


def partition_worker(job: Job) -> None:
    job.cluster.tool("partition", job.nodes[1])


def drain_and_stop(job: Job) -> None:
    """Drain a node as an administrator would, then signal the job, which must leave that node."""
    job.cluster.slurm("scontrol", "update", f"nodename={job.nodes[1]}", "state=drain", "reason=test")
    signal_all_ranks(job)


def kill_one_rank(job: Job) -> None:
    for pid, settings in job.environments():
        if b"SLURM_PROCID=1" in settings and b"SLURM_STEP_ID=0" in settings:
            os.kill(pid, signal.SIGKILL)


def repair(cluster: LocalCluster) -> None:
    """Restore every node after a fault."""
    for node in (f"node{number}" for number in range(1, 5)):
        if not (cluster.folder / "run" / f"{node}.pid").exists():
            cluster.tool("start", node)
        cluster.tool("heal", node)
        subprocess.run(
            ["scontrol", "update", f"nodename={node}", "state=resume"],
            env=cluster.variables,
            capture_output=True,
        )


# fault -> how to cause it, and the steps that may be lost: one by a signal, those since a save by a crash.
# test_signal_matrix.py sends every signal to every process.
FAULTS: dict[str, tuple[Callable[[Job], None], int]] = {
    "scontrol requeue": (requeue, SAVE_EVERY),
    "preemption": (preempt, 1),
    "kill -9 of a rank": (kill_one_rank, SAVE_EVERY),
    "drained node, USR1": (drain_and_stop, 1),
    "crash of a worker node": (crash_worker, SAVE_EVERY),
    "crash of the batch host": (crash_batch_host, SAVE_EVERY),
    "network partition": (partition_worker, SAVE_EVERY),
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_run_goes_on_after(
    name: str, long_run: LongRun, undisturbed: dict[int, float], fault_times: list[FaultTimes]
) -> None:
    inflict, may_lose = FAULTS[name]
    long_run.live()
    job, run, restarts = long_run.job, long_run.run, long_run.job.restarts
    at_fault, started = time.time(), run.step
    inflict(job)
    wait_for(lambda: job.restarts > restarts, f"{name}: requeued")
    requeued, reached = time.time(), run.step
    trained, resumed_from = run.steps_beyond(job, restarts + 1)
    repair(long_run.cluster)
    assert reached - resumed_from <= may_lose and resumed_from >= started - SAVE_EVERY
    done = losses(run.path)
    assert done == {step: undisturbed[step] for step in range(1, len(done) + 1)}
    job.ended_everywhere(restarts)
    assert not run.events(job, "finished")
    lost = max(0, reached - resumed_from)
    fault_times.append(FaultTimes(name, requeued - at_fault, trained - at_fault, lost))


def test_a_restart_of_slurmctld_is_not_noticed(
    long_run: LongRun, undisturbed: dict[int, float], fault_times: list[FaultTimes]
) -> None:
    long_run.live()
    job, run, restarts, before = long_run.job, long_run.run, long_run.job.restarts, long_run.run.step
    long_run.cluster.tool("crash", "slurmctld")
    wait_for(lambda: run.step > before + 3, "steps without slurmctld")
    long_run.cluster.tool("start", "slurmctld")
    assert job.state == "RUNNING" and job.restarts == restarts
    done = losses(run.path)
    assert done == {step: undisturbed[step] for step in range(1, len(done) + 1)}
    fault_times.append(FaultTimes("restart of slurmctld", None, None, 0))


def test_the_kill_file_ends_the_job_for_good(long_run: LongRun, undisturbed: dict[int, float]) -> None:
    long_run.live()
    job, run = long_run.job, long_run.run
    (run.path / "save").touch()
    wait_for(lambda: not (run.path / "save").exists(), "the save file is consumed")
    (run.path / "kill").touch()
    job.wait("FAILED")  # exit code 75
    job.ended_everywhere()
    assert not (run.path / "kill").exists()
    assert run.events(job)[-1].reason == "RUN/kill"
    done = losses(run.path)
    assert done == {step: undisturbed[step] for step in range(1, len(done) + 1)}
