"""`everest-ds submit`: check a job, then hand it to sbatch, to one's eyes (--dry-run) or to this machine."""

from __future__ import annotations

import os
import sys
import time as clock
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from everest_ds.cli.output import JsonFile, print_facts, write_json
from everest_ds.errors import UsageError

if TYPE_CHECKING:
    from everest_ds.cli.submission import Stage, Target
    from everest_ds.launch.sbatch import BatchJob, Shape
    from everest_ds.launch.sweep_file import Candidate

Kind = Literal["pretrain", "finetune", "evaluate", "profile", "chain", "sweep"]
Job = Annotated[Kind, typer.Argument(metavar="JOB", help="pretrain|finetune|evaluate|profile|chain|sweep")]
Words = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE [KEY.PATH=VALUE]... [SBATCH OPTION]...",
        help="As for the command itself; chain takes two recipes. Options that are not listed here go to"
        " sbatch unchanged.",
    ),
]
Nodes = Annotated[int, typer.Option(min=1, help="Nodes.")]
GpusPerNode = Annotated[int | None, typer.Option(min=1, help="GPUs of a node, and ranks: one a GPU.")]
TasksPerNode = Annotated[int | None, typer.Option(min=1, help="Ranks of a node without GPUs.")]
Time = Annotated[str | None, typer.Option(help="Time limit, such as 1-00:00:00.")]
Partition = Annotated[str | None, typer.Option(help="Partition.")]
Array = Annotated[str | None, typer.Option(help="sweep: these tasks only, or %N at once. Else: 0-9%1.")]
Dependency = Annotated[str | None, typer.Option(help="Such as afterok:123; that job may make the weights.")]
Nodelist = Annotated[str | None, typer.Option(help="These nodes; --dry-run shows which rank runs where.")]
Gpu = Annotated[str | None, typer.Option(help="Hold predicted memory against this GPU, such as 'A100 80GB'.")]
Cluster = Annotated[str | None, typer.Option(help="Settings of a site: a name in slurm/clusters, or a file.")]
MaxRestarts = Annotated[int | None, typer.Option(min=0, help="Times that the job may requeue itself.")]
Grid = Annotated[list[str] | None, typer.Option(metavar="KEY=A,B,...", help="sweep: all combinations.")]
Candidates = Annotated[Path | None, typer.Option(help='sweep: JSON lines of {"overrides": ["key=value"]}.')]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the sbatch command and when it would start.")]
Local = Annotated[bool, typer.Option("--local", help="Run the same here, without SLURM.")]


@dataclass(frozen=True)
class _Queueing:
    """What only the queue needs to know."""

    time: str | None
    partition: str | None
    array: str | None
    dependency: str | None
    options: tuple[str, ...]
    environment: dict[str, str]


def submit(
    job: Job,
    words: Words,
    nodes: Nodes = 1,
    gpus_per_node: GpusPerNode = None,
    ntasks_per_node: TasksPerNode = None,
    time: Time = None,
    partition: Partition = None,
    array: Array = None,
    dependency: Dependency = None,
    nodelist: Nodelist = None,
    gpu: Gpu = None,
    cluster: Cluster = None,
    max_restarts: MaxRestarts = None,
    grid: Grid = None,
    candidates: Candidates = None,
    dry_run: DryRun = False,
    local: Local = False,
    json_file: JsonFile = None,
) -> None:
    """Check a job as a whole, then queue it with SLURM; what cannot run is refused at once.

    Two recipes make a chain: pretrain, finetune, evaluate, report. A sweep is an array job.

    Example: everest-ds submit pretrain my.yaml run.dir=runs/a --nodes 4 --gpus-per-node 8 --time 1-00:00:00
             everest-ds submit chain my_pretrain.yaml my_finetune.yaml --gpus-per-node 8
             everest-ds submit sweep my.yaml run.dir=runs/lr --grid batch.micro_batch_size=8,16 ...
    """
    from everest_ds.cli.submission import Target
    from everest_ds.launch.sbatch import split_options

    began = clock.perf_counter()
    positional, options = split_options(words)
    shape = _shape(job, nodes, gpus_per_node, ntasks_per_node)
    target = Target(shape, gpu, inputs_follow=dependency is not None)
    environment = _environment(cluster, max_restarts)
    listed = [] if nodelist is None else [f"--nodelist={nodelist}"]
    queueing = _Queueing(time, partition, array, dependency, (*listed, *options), environment)
    stages, swept = _plan(job, positional, target, grid or [], candidates)
    ranks = None if nodelist is None else _place(nodelist, shape)
    jobs = _as_jobs(stages, swept, queueing)
    checked_ms = 1000 * (clock.perf_counter() - began)
    for stage in stages:
        if stage.facts:
            print_facts(f"Plan: {stage.command}", {**stage.facts, **_where(ranks)})
    if dry_run:
        _show(jobs, ranks, checked_ms, json_file)
    elif local:
        _run_here(stages, swept)
    else:
        _queue(stages, jobs, swept, json_file)


def _shape(job: str, nodes: int, gpus: int | None, tasks: int | None) -> Shape:
    from everest_ds.launch.sbatch import Shape

    if gpus is None and tasks is None:
        if job != "profile":
            raise UsageError(
                "number of ranks per node", fix="give --gpus-per-node, or --ntasks-per-node for ranks on CPUs"
            )
        gpus = 1
    if gpus is not None and tasks not in (None, gpus):
        raise UsageError("one rank a GPU", given=f"--gpus-per-node {gpus} --ntasks-per-node {tasks}")
    return Shape(nodes, gpus or 0, gpus or tasks or 1)


def _environment(cluster: str | None, max_restarts: int | None) -> dict[str, str]:
    """What the scripts of slurm/ read, and what sbatch reads of the site's settings."""
    from everest_ds.launch.cluster_file import find_cluster_file, read_cluster_file
    from everest_ds.shipped import shipped

    folder = shipped("slurm").resolve()
    name = cluster or os.environ.get("EVEREST_CLUSTER")
    file = None if name is None else find_cluster_file(name, folder / "clusters")
    given = {
        "EVEREST_PYTHON": sys.executable,
        **({} if file is None else read_cluster_file(file)),
        "EVEREST_SLURM": str(folder),
        "EVEREST_CLUSTER": None if file is None else str(file),
        "EVEREST_MAX_RESTARTS": None if max_restarts is None else str(max_restarts),
    }
    return {name: value for name, value in given.items() if value is not None}


def _plan(
    job: str, words: Sequence[str], target: Target, grid: Sequence[str], candidates: Path | None
) -> tuple[list[Stage], list[Candidate]]:
    from everest_ds.cli import submission
    from everest_ds.cli.chain import plan_chain
    from everest_ds.cli.sweep import plan_sweep

    if job == "chain":
        return plan_chain(words, target), []
    if not words:
        raise UsageError("RECIPE is missing", fix="name a recipe, a YAML file or a run folder")
    source, *overrides = words
    if job == "sweep":
        return plan_sweep(source, overrides, target, grid, candidates)
    if grid or candidates:
        raise UsageError("--grid and --candidates", given=job, fix="are for sweep")
    if job == "profile":
        return [submission.plan_profile(source, overrides, target)], []
    return [submission.plan_command(job, source, overrides, target)], []


def _place(nodelist: str, shape: Shape) -> list[Any]:
    from everest_ds.launch.rank_table import hosts_of, place_ranks

    return place_ranks(hosts_of(nodelist, shape.nodes), shape.ranks_per_node)


def _where(ranks: Sequence[Any] | None) -> dict[str, str]:
    if not ranks:
        return {}
    first, last = ranks[0], ranks[-1]
    return {"seats": f"rank {first.rank} on {first.host} ... rank {last.rank} on {last.host}"}


def _as_jobs(stages: Sequence[Stage], swept: Sequence[Candidate], queueing: _Queueing) -> list[BatchJob]:
    """One job a stage; each waits for the one before it, whose id is filled in when it is known."""
    from everest_ds.launch.sbatch import BatchJob, job_name
    from everest_ds.shipped import shipped

    jobs = []
    for number, stage in enumerate(stages):
        run = stage.run
        jobs.append(
            BatchJob(
                script=(shipped("slurm") / f"{stage.command}.sbatch").resolve(),
                arguments=stage.arguments,
                name=job_name(stage.command, run or Path(stage.arguments[0])),
                shape=stage.shape,
                logs=None if run is None else run / "logs",
                time=queueing.time,
                partition=queueing.partition,
                array=_array(queueing.array, stage, swept),
                dependency=queueing.dependency if number == 0 else f"afterok:{_PREVIOUS}",
                options=queueing.options,
                environment=queueing.environment,
            )
        )
    return jobs


_PREVIOUS = "JOB-BEFORE"


def _array(asked: str | None, stage: Stage, swept: Sequence[Candidate]) -> str | None:
    from everest_ds.launch.sweep_file import expand_array

    if stage.command == "sweep":
        if asked is not None and asked.startswith("%"):
            asked = f"0-{len(swept) - 1}{asked}"
        expand_array(asked or "0", len(swept))
        return asked or f"0-{len(swept) - 1}"
    if asked is not None and not asked.endswith("%1"):
        raise UsageError(
            "--array: tasks of one run must follow one another", given=asked, fix=f"--array={asked}%1"
        )
    return asked


def _show(
    jobs: Sequence[BatchJob], ranks: Sequence[Any] | None, checked_ms: float, json_file: Path | None
) -> None:
    from everest_ds.launch.sbatch import as_shell, sbatch_command
    from everest_ds.launch.slurm import has_slurm, test_only

    rows = []
    for job in jobs:
        waits = job.dependency is not None
        says = test_only(job) if has_slurm() and not waits else _no_word(waits)
        shown = as_shell(sbatch_command(job))
        rows.append({"command": sbatch_command(job), "environment": dict(job.environment), "says": says})
        for name, value in job.environment.items():
            typer.echo(f"export {as_shell([f'{name}={value}'])}")
        typer.echo(shown)
        typer.echo(f"# {says}\n")
    seats = None if ranks is None else [place._asdict() for place in ranks]
    write_json(json_file, {"jobs": rows, "ranks": seats, "checked_ms": checked_ms})


def _no_word(waits: bool) -> str:
    return "starts after the job it depends on" if waits else "no SLURM here to say when it would start"


def _queue(
    stages: Sequence[Stage], jobs: Sequence[BatchJob], swept: Sequence[Candidate], json_file: Path | None
) -> None:
    from everest_ds.cli.sweep import keep_candidates
    from everest_ds.launch.sbatch import as_shell
    from everest_ds.launch.slurm import has_slurm
    from everest_ds.launch.submitted import queue

    if not has_slurm():
        raise UsageError("SLURM is not installed here", fix="add --local to run the same on this machine")
    if swept:
        keep_candidates(stages[0], swept)
    queued: list[dict[str, str]] = []
    for stage, job in zip(stages, jobs, strict=True):
        if queued:
            job = replace(job, dependency=f"afterok:{queued[-1]['job']}")
        job_id = queue(job, stage.command, _runs_of(stage, job, swept), stage.run)
        queued.append({"job": job_id, "command": stage.command, "run": str(stage.run or "")})
        typer.echo(
            f"{stage.command}: job {job_id}" + (f" in {as_shell([str(stage.run)])}" if stage.run else "")
        )
    folders = sorted({as_shell([row["run"]]) for row in queued if row["run"]})
    if folders:
        typer.echo(f"watch: everest-ds jobs {' '.join(folders)}")
    write_json(json_file, queued)


def _runs_of(stage: Stage, job: BatchJob, swept: Sequence[Candidate]) -> dict[str, Path]:
    """Suffix of the job's id -> the run folder that logs it."""
    from everest_ds.launch.sweep_file import expand_array

    if stage.run is None:
        return {}
    if stage.command != "sweep":
        return {"": stage.run}
    tasks = expand_array(job.array or "0", len(swept))
    return {f"_{task}": stage.run / swept[task].name for task in tasks}


def _run_here(stages: Sequence[Stage], swept: Sequence[Candidate]) -> None:
    from everest_ds.cli.here import run_stages, run_sweep

    code = run_sweep(stages[0], swept) if swept else run_stages(stages)
    if code:
        raise typer.Exit(code)
