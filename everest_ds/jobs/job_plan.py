"""The plan of a submission: the shape of its jobs, their environment and their stages."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from everest_ds.errors import UsageError

if TYPE_CHECKING:
    from everest_ds.jobs.sbatch import JobShape
    from everest_ds.jobs.job_checks import Stage, Target
    from everest_ds.jobs.sweep_file import SweepCandidate


def job_shape(job: str, nodes: int, gpus: int | None, tasks: int | None) -> JobShape:
    """Return the ranks of a job, given its nodes and its GPUs or tasks per node.

    Raises:
        UsageError: neither GPUs nor tasks were given, or they contradict each other.
    """
    from everest_ds.jobs.sbatch import JobShape

    if gpus is None and tasks is None:
        if job != "profile":
            raise UsageError(
                "the number of ranks per node is missing",
                fix="give --gpus-per-node, or --ntasks-per-node for ranks on CPUs",
            )
        gpus = 1
    if gpus is not None and tasks not in (None, gpus):
        raise UsageError(
            f"--ntasks-per-node {tasks} does not match --gpus-per-node {gpus}",
            allowed="one rank per GPU",
            fix="leave out --ntasks-per-node",
        )
    return JobShape(nodes, gpus or 0, gpus or tasks or 1)


def job_environment(
    cluster: str | None, max_restarts: int | None, signal_seconds: int | None
) -> dict[str, str]:
    """Return the environment variables for sbatch and the scripts in slurm/, the site's settings included."""
    from everest_ds.jobs.sbatch import find_cluster_file, read_cluster_file
    from everest_ds.shipped import shipped

    folder = shipped("slurm").resolve()
    name = cluster or os.environ.get("EVEREST_CLUSTER")
    file = None if name is None else find_cluster_file(name, folder / "clusters")
    given = {
        "EVEREST_PYTHON": sys.executable,
        **({} if file is None else read_cluster_file(file)),
        "EVEREST_SLURM": str(folder),
        "EVEREST_CLUSTER": None if file is None else str(file),
        "EVEREST_MAX_RESTARTS": max_restarts,
        "EVEREST_SIGNAL_SECONDS": signal_seconds,
    }
    return {name: str(value) for name, value in given.items() if value is not None}


def plan_stages(
    job: str, words: Sequence[str], target: Target, grid: Sequence[str], candidates: Path | None
) -> tuple[list[Stage], list[SweepCandidate]]:
    """Plan and check the stages of a submission, and the candidates if it is a sweep.

    Args:
        job: the kind of job, such as `pretrain`, `chain` or `sweep`.
        words: the recipe and its overrides; for a chain, two recipes and their overrides.
        target: the hardware of the jobs.
        grid: settings of a sweep as `KEY=A,B,...`.
        candidates: a JSON-lines file with the settings of a sweep.

    Raises:
        EverestError: a job could not run.
    """
    from everest_ds.jobs import job_checks
    from everest_ds.jobs.chain import plan_chain
    from everest_ds.jobs.sweep import plan_sweep

    if job == "chain":
        return plan_chain(words, target), []
    if not words:
        raise UsageError("RECIPE is missing", fix="name a recipe, a YAML file or a run folder")
    source, *overrides = words
    if job == "sweep":
        return plan_sweep(source, overrides, target, grid, candidates)
    if grid or candidates:
        raise UsageError(f"--grid or --candidates was given for {job}", fix="use them with submit sweep")
    if job == "profile":
        return [job_checks.plan_profile(source, overrides, target)], []
    return [job_checks.plan_command(job, source, overrides, target)], []
