"""Fixtures of the SLURM tests: one cluster per session, an undisturbed run, and the table of fault costs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from everest_ds.config import dump_experiment
from tests.signals.fixtures import signal_report, slurm_cases
from tests.slurm.cluster import SCRIPTS, LocalCluster, Run
from tests.slurm.report import FaultTimes, to_markdown
from tests.training.runs import experiment, losses

__all__ = ["signal_report", "slurm_cases"]

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
# Enough for a checkpoint of 3 MiB, the next one that replaces it, and the logs.
SMALL_DISK_MIB = 24
NUM_STEPS = 300


def missing() -> str | None:
    """Return why no cluster can be started on this machine, or None if it can."""
    if sys.platform != "linux":
        return "needs Linux"
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=search) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (apt-get install slurmctld slurmd slurm-client munge)"
    if os.geteuid() != 0 or subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "needs root and the right to make namespaces"
    return None


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A cluster of four nodes, with a small disk for run folders at `small-disk` beside its folder."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("slurm")
    disk = base / "small-disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_MIB}m", "small", str(disk)], check=True)
    local = LocalCluster(base / "cluster")
    try:
        local.tool("up", "--nodes", "4", "--cpus", "4")
        yield local
    finally:
        local.tool("down")
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def recipe(motion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of a run with short steps that saves every tenth step; tests set its `run.dir`."""
    config = experiment(
        motion_data,
        Path("runs/unnamed"),
        model={"backbone": "vit_tiny", "image_size": 16, "patch_size": 8, "num_frames": 4},
        data={"num_workers": 0},
        schedule={"epochs": NUM_STEPS // 3, "warmup_epochs": 1},
        run={"save_every_steps": 10, "hang_timeout_s": 60},
    )
    file = tmp_path_factory.mktemp("recipe") / "pre.yaml"
    file.write_text(dump_experiment(config))
    return file


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that jobs are submitted from."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(autouse=True)
def in_work(request: pytest.FixtureRequest) -> None:
    """Make `work` the current folder, where jobs write their output."""
    if request.node.get_closest_marker("slurm"):
        request.getfixturevalue("monkeypatch").chdir(request.getfixturevalue("work"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """After a failure, add the output of the jobs and the daemons' logs to the report, and end all jobs.

    The files are deleted with the cluster, and a job that is still running would disturb the next tests.
    """
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, LocalCluster):
        try:
            report.sections.extend(cluster.records())
            cluster.cancel_all()
        except (AssertionError, subprocess.SubprocessError) as error:  # the cluster itself may have failed
            report.sections.append(("the cluster does not answer", str(error)))
    return report


@pytest.fixture(scope="session")
def undisturbed(
    cluster: LocalCluster, recipe: Path, work: Path, fault_times: list[FaultTimes]
) -> dict[int, float]:
    """The losses of a run that is not disturbed, from its submission to its end."""
    folder, submitted = work / "undisturbed", time.time()
    job = cluster.submit(
        SCRIPTS / "pretrain.sbatch", str(recipe), f"run.dir={folder}", options=(f"--chdir={work}",)
    )
    first_step, _ = Run(folder).steps_beyond(job, 0)
    fault_times.append(FaultTimes("none: sbatch to the first step", None, first_step - submitted, 0))
    job.wait("COMPLETED")
    job.ended_everywhere()
    assert [e.event for e in Run(folder).events(job)] == ["started", "finished"]
    return losses(folder)


@pytest.fixture(scope="session")
def fault_times(pytestconfig: pytest.Config) -> Iterator[list[FaultTimes]]:
    """The rows of the table that `--slurm-report FILE` writes."""
    rows: list[FaultTimes] = []
    yield rows
    file = pytestconfig.getoption("--slurm-report")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_markdown(rows))
