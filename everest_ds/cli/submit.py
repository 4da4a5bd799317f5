"""`everest-ds submit`: check a job, then queue it with sbatch, print it (--dry-run) or run it (--local)."""

from __future__ import annotations

import os
import time as clock
from pathlib import Path
from typing import Annotated

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.console import print_facts, write_json
from everest_ds.jobs.job_plan import (
    Hardware,
    JobKind,
    JobRequest,
    QueueSettings,
    Submission,
    plan_submission,
)
from everest_ds.jobs.local_runner import run_locally
from everest_ds.jobs.queue import jobs_to_queue, plan_tables, queue_all, wait_until_over
from everest_ds.jobs.sbatch import as_shell, split_options

Job = Annotated[
    JobKind, typer.Argument(metavar="JOB", help="The command to run, or a chain or a sweep of runs.")
]
RecipeWords = Annotated[
    list[str],
    typer.Argument(
        metavar="RECIPE [KEY.PATH=VALUE]... [SBATCH OPTION]...",
        help="A recipe and the settings to change, as for the command itself; a chain takes two recipes."
        " Options that are not listed below go to sbatch unchanged.",
    ),
]
NumNodes = Annotated[int, typer.Option(min=1, help="Number of nodes.")]
GpusPerNode = Annotated[int | None, typer.Option(min=1, help="GPUs per node; one rank runs on each GPU.")]
TasksPerNode = Annotated[int | None, typer.Option(min=1, help="Ranks per node, on nodes without GPUs.")]
Time = Annotated[str | None, typer.Option(help="Time limit of each job, such as 1-00:00:00 (one day).")]
Partition = Annotated[str | None, typer.Option(help="SLURM partition to run in.")]
Array = Annotated[
    str | None,
    typer.Option(
        help="Sweep: the tasks to run, or %N to run N at a time. Single run: successive tasks, such as 0-9%1."
    ),
]
Dependency = Annotated[
    str | None,
    typer.Option(
        help="Start after another job, such as afterok:123; the weights that it writes need not exist yet."
    ),
]
Nodelist = Annotated[
    str | None,
    typer.Option(
        help="Nodes to run on, such as gpu[01-04]; the plan then shows on which hosts the ranks run."
    ),
]
CheckedGpu = Annotated[
    str | None, typer.Option(help="Check the predicted memory against this GPU, such as a100-80gb.")
]
SiteSettings = Annotated[
    str | None,
    typer.Option(
        help="Settings of your site: a name in slurm/clusters, or a file. Default: $EVEREST_CLUSTER."
    ),
]
MaxRestarts = Annotated[
    int | None,
    typer.Option(
        min=0, help="Number of times that a job may be restarted. Default: $EVEREST_MAX_RESTARTS, or 50."
    ),
]
Grid = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=A,B,...",
        help="Sweep: the values of one key. Several --grid options give every combination of their values.",
    ),
]
Candidates = Annotated[
    Path | None, typer.Option(help='Sweep: a file with one run per line, as {"overrides": ["key=value"]}.')
]
PrintOnly = Annotated[
    bool,
    typer.Option("--dry-run", help="Print the sbatch commands and the expected start time; queue nothing."),
]
Wait = Annotated[
    bool,
    typer.Option(
        "--wait",
        "-W",
        help="Wait until the jobs have ended; the exit code is that of the first job that did not finish."
        " Default: whether $SBATCH_WAIT is set.",
    ),
]
Local = Annotated[bool, typer.Option("--local", help="Run the jobs on this machine, without SLURM.")]


def submit(
    job: Job,
    words: RecipeWords,
    nodes: NumNodes = 1,
    gpus_per_node: GpusPerNode = None,
    ntasks_per_node: TasksPerNode = None,
    time: Time = None,
    partition: Partition = None,
    array: Array = None,
    dependency: Dependency = None,
    nodelist: Nodelist = None,
    gpu: CheckedGpu = None,
    cluster: SiteSettings = None,
    max_restarts: MaxRestarts = None,
    grid: Grid = None,
    candidates: Candidates = None,
    wait: Wait = False,
    dry_run: PrintOnly = False,
    local: Local = False,
    json_file: JsonFile = None,
) -> None:
    """Check a job as a whole, then queue it with SLURM; refuse a job that could not run.

    A chain takes two recipes and queues four jobs: pretrain, finetune, evaluate and report. A sweep is an
    array job with one run per combination of settings.

    Example: everest-ds submit pretrain my.yaml run.dir=runs/a --nodes 4 --gpus-per-node 8 --time 1-00:00:00
             everest-ds submit chain my_pretrain.yaml my_finetune.yaml --gpus-per-node 8
             everest-ds submit sweep my.yaml run.dir=runs/lr --grid batch.micro_batch_size=8,16 ...
    """
    began = clock.perf_counter()
    positional, options = split_options(words)
    hardware = Hardware(nodes, gpus_per_node, ntasks_per_node, gpu)
    queue = QueueSettings(time, partition, array, dependency, nodelist, tuple(options), cluster, max_restarts)
    submission = plan_submission(JobRequest(job, positional, hardware, queue, grid or (), candidates))
    checked_ms = 1000 * (clock.perf_counter() - began)
    for title, facts in plan_tables(submission):
        print_facts(title, facts)
    if dry_run:
        _show(submission, checked_ms, json_file)
    elif local:
        code = run_locally(submission)
        if code:
            raise typer.Exit(code)
    else:
        queued = queue_all(submission, typer.echo)
        write_json(json_file, queued)
        if (wait or "SBATCH_WAIT" in os.environ) and (code := wait_until_over(queued)):
            raise typer.Exit(code)


def _show(submission: Submission, checked_ms: float, json_file: Path | None) -> None:
    """Print the sbatch commands, quoted for a shell."""
    rows = jobs_to_queue(submission)
    for row in rows:
        for name, value in row["environment"].items():
            typer.echo(f"export {as_shell([f'{name}={value}'])}")
        typer.echo(f"{as_shell(row['command'])}\n# {row['says']}\n")
    places = [place._asdict() for place in submission.ranks]
    write_json(json_file, {"jobs": rows, "ranks": places, "checked_ms": checked_ms})
