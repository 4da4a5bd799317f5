"""Signals that reach a job while its ranks do not run yet or no more: the job still requeues itself."""

from __future__ import annotations

import contextlib
import signal
from pathlib import Path

import pytest

from everest_ds.stop_signals import STOP_SIGNALS
from tests.slurm.cluster import SCRIPTS, Job, LocalCluster, Run, wait_for
from tests.training.runs import losses

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


def send_during(command: str, job: Job, number: signal.Signals) -> None:
    """Send a signal to all processes of the job, also on the batch host, while it runs `job` `command`."""
    words = f"everest_ds\0job\0{command}\0".encode()

    def runs() -> bool:
        for pid in job.processes():
            with contextlib.suppress(OSError):
                if words in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
        return False

    wait_for(runs, f"job {command}")
    job.cluster.slurm("scancel", "--full", f"--signal={number.name}", job.number)


@pytest.mark.parametrize("container", ["", "--mpi=none"], ids=["on the node", "as a step"])
def test_no_signal_around_the_ranks_loses_the_job(
    container: str, cluster: LocalCluster, recipe: Path, work: Path, undisturbed: dict[int, float]
) -> None:
    """A container makes `job begin` and `job end` steps, to whose processes SLURM sends signals itself."""
    run = Run(work / f"around-{container}")
    site = work / f"site-{container}.env"
    site.write_text(f"EVEREST_CONTAINER=({container})\n")
    job = cluster.submit(
        SCRIPTS / "pretrain.sbatch", str(recipe), f"run.dir={run.path}", EVEREST_CLUSTER=str(site)
    )

    def started(restarts: int) -> None:
        wait_for(lambda: (job.restarts, job.state) == (restarts, "RUNNING"), "started")

    def requeued(restarts: int) -> None:
        wait_for(lambda: any(e.restarts == restarts for e in run.events(job, "requeued")), "requeued")

    for restarts, number in enumerate(STOP_SIGNALS):
        started(restarts)
        send_during("begin", job, number)
        requeued(restarts)
    for restarts, number in enumerate(STOP_SIGNALS, len(STOP_SIGNALS)):
        run.steps_beyond(job, restarts)
        cluster.slurm("scancel", "--signal=USR1", job.number)
        send_during("end", job, number)
        requeued(restarts)
    run.steps_beyond(job, 2 * len(STOP_SIGNALS))
    (run.path / "kill").touch()
    job.wait("FAILED")  # exit code 75: stopped on request
    job.ended_everywhere()
    done = losses(run.path)
    assert done == {step: undisturbed[step] for step in range(1, len(done) + 1)}
