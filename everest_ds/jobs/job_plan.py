"""The plan of a submission: a request for jobs, checked as a whole and turned into calls of sbatch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from everest_ds.errors import UsageError
from everest_ds.jobs.chain import dependency_on, plan_chain
from everest_ds.jobs.job_checks import Stage, Target, plan_command, plan_profile
from everest_ds.jobs.sbatch import (
    BatchJob,
    JobShape,
    check_signal,
    exporting,
    find_cluster_file,
    job_name,
    read_cluster_file,
    signal_seconds,
    signalling,
)
from everest_ds.jobs.sweep import plan_sweep
from everest_ds.jobs.sweep_file import SweepCandidate, expand_array
from everest_ds.launch.slurm_nodelist import RankPlace, hosts_of, place_ranks
from everest_ds.shipped import shipped

JobKind = Literal["pretrain", "finetune", "evaluate", "profile", "chain", "sweep"]


@dataclass(frozen=True)
class Hardware:
    """The nodes and ranks that a request asks for.

    Attributes:
        nodes: number of nodes.
        gpus_per_node: GPUs on each node, with one rank per GPU; None for ranks on CPUs.
        tasks_per_node: ranks on each node; None for one rank per GPU.
        gpu: name of the GPU to check predicted memory against; None to skip the check.
    """

    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    gpu: str | None = None


@dataclass(frozen=True)
class QueueSettings:
    """The settings of a request that only SLURM and the scripts in slurm/ read.

    Attributes:
        time: time limit of each job, such as `1-00:00:00`.
        array: value of sbatch's `--array`; `%N` runs N tasks of a sweep at a time.
        dependency: jobs to wait for, such as `afterok:123`; they may still have to write the weights.
        nodelist: nodes to run on, such as `gpu[01-04]`.
        options: further options of sbatch, passed on unchanged.
        cluster: name of a file in slurm/clusters, or a path; None for $EVEREST_CLUSTER.
        max_restarts: number of times that a job may be restarted; None for the default of the jobs.
    """

    time: str | None = None
    partition: str | None = None
    array: str | None = None
    dependency: str | None = None
    nodelist: str | None = None
    options: Sequence[str] = ()
    cluster: str | None = None
    max_restarts: int | None = None


@dataclass(frozen=True)
class JobRequest:
    """A request for one job, a chain of jobs or a sweep.

    Attributes:
        words: the recipe and its overrides; for a chain, two recipes and their overrides.
        grid: settings of a sweep as `KEY=A,B,...`.
        candidates: a JSON-lines file with the settings of a sweep.
    """

    kind: JobKind
    words: Sequence[str]
    hardware: Hardware = field(default_factory=Hardware)
    queue: QueueSettings = field(default_factory=QueueSettings)
    grid: Sequence[str] = ()
    candidates: Path | None = None


@dataclass(frozen=True)
class Submission:
    """The checked jobs of a request, ready to be queued or run on this machine.

    Attributes:
        stages: successive commands of the submission.
        swept: the runs of a sweep, whose only stage is an array job; empty for other kinds.
        jobs: the sbatch job of each stage.
        ranks: the places of all ranks if the nodes were named; otherwise empty.
    """

    stages: Sequence[Stage]
    swept: Sequence[SweepCandidate]
    jobs: Sequence[BatchJob]
    ranks: Sequence[RankPlace]


def plan_submission(request: JobRequest) -> Submission:
    """Check a request as a whole and return its jobs; nothing is queued or written.

    Raises:
        EverestError: if one of the jobs could not run.
    """
    hardware, queue = request.hardware, request.queue
    shape = _shape(request.kind, hardware)
    target = Target(shape, hardware.gpu, inputs_follow=queue.dependency is not None)
    stages, swept = _plan_stages(request, target)
    jobs = _as_jobs(stages, queue, _array(queue.array, stages, swept))
    named = queue.nodelist
    ranks = [] if named is None else place_ranks(hosts_of(named, hardware.nodes), shape.ranks_per_node)
    return Submission(stages, swept, jobs, ranks)


def _shape(kind: JobKind, hardware: Hardware) -> JobShape:
    gpus, tasks = hardware.gpus_per_node, hardware.tasks_per_node
    if gpus is None and tasks is None:
        if kind != "profile":
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
    return JobShape(hardware.nodes, gpus or 0, gpus or tasks or 1)


def _plan_stages(request: JobRequest, target: Target) -> tuple[list[Stage], list[SweepCandidate]]:
    """Plan and check the stages of a request, and the candidates if it is a sweep."""
    kind, words = request.kind, request.words
    if kind == "chain":
        return plan_chain(words, target), []
    if not words:
        raise UsageError("RECIPE is missing", fix="name a recipe, a YAML file or a run folder")
    source, *overrides = words
    if kind == "sweep":
        return plan_sweep(source, overrides, target, request.grid, request.candidates)
    if request.grid or request.candidates:
        raise UsageError(f"--grid or --candidates was given for {kind}", fix="use them with submit sweep")
    if kind == "profile":
        return [plan_profile(source, overrides, target)], []
    return [plan_command(kind, source, overrides, target)], []


def _array(given: str | None, stages: Sequence[Stage], swept: Sequence[SweepCandidate]) -> str | None:
    if swept:
        every = f"0-{len(swept) - 1}"
        array = every if given is None else f"{every}{given}" if given.startswith("%") else given
        expand_array(array, len(swept))
        return array
    if given is not None and (len(stages) > 1 or not given.endswith("%1")):
        raise UsageError(
            "--array cannot be used with a chain"
            if len(stages) > 1
            else "--array: its tasks would train one run at the same time",
            given=given,
            allowed="for a single run, tasks one after another, such as 0-9%1",
        )
    return given


def _as_jobs(stages: Sequence[Stage], queue: QueueSettings, array: str | None) -> list[BatchJob]:
    """Build one job per stage; each job waits for the one before it."""
    environment = _environment(queue)
    defaults = {**os.environ, **environment}  # sbatch reads SBATCH_... wherever its command line says nothing
    options = signalling(queue.options, defaults.get("SBATCH_SIGNAL"))
    check_signal(options, queue.time)
    if (seconds := signal_seconds(options)) is not None:
        environment["EVEREST_SIGNAL_SECONDS"] = str(seconds)
    own = [name for name in environment if name.startswith("EVEREST_")]
    options = exporting(options, defaults.get("SBATCH_EXPORT"), own)
    # The ids of a chain's jobs are not known before these jobs are submitted.
    placeholders = [f"{stage.command.upper()}-JOB" for stage in stages]
    return [
        BatchJob(
            script=shipped("slurm").resolve() / f"{stage.command}.sbatch",
            arguments=stage.arguments,
            name=job_name(stage.command, stage.run or Path(stage.arguments[0])),
            shape=stage.shape,
            logs=None if stage.run is None else stage.run.absolute() / "logs",
            time=queue.time,
            partition=queue.partition,
            array=array,
            dependency=dependency_on(placeholders[:number], stage.command) or queue.dependency,
            nodelist=queue.nodelist if stage.shape == stages[0].shape else None,
            options=tuple(options),
            environment=environment,
        )
        for number, stage in enumerate(stages)
    ]


def _environment(queue: QueueSettings) -> dict[str, str]:
    """Return the variables that sbatch and the scripts in slurm/ read, the site's settings included.

    The jobs use the Python that the caller exported as EVEREST_PYTHON, or that of the cluster file, or the
    Python of this process.
    """
    folder = shipped("slurm").resolve()
    name = queue.cluster or os.environ.get("EVEREST_CLUSTER")
    file = None if name is None else find_cluster_file(name, folder / "clusters")
    given = {
        "EVEREST_PYTHON": os.environ.get("EVEREST_PYTHON") or sys.executable,
        **({} if file is None else read_cluster_file(file)),
        "EVEREST_SLURM": str(folder),
        "EVEREST_CLUSTER": None if file is None else str(file),
        "EVEREST_MAX_RESTARTS": queue.max_restarts,
    }
    return {name: str(value) for name, value in given.items() if value is not None}
