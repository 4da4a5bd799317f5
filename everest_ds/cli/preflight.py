"""The commands `everest-ds doctor` and `preflight`, which check a machine and the nodes of a job."""

from __future__ import annotations

from dataclasses import asdict

import typer

from everest_ds.cli.options import JsonFile, Overrides, RecipeArg
from everest_ds.cli.ranks import check_nodes_as_rank
from everest_ds.config import Experiment, load_experiment, shared_memory_bytes
from everest_ds.console import print_table, write_json
from everest_ds.errors import ExitCode
from everest_ds.launch.doctor import examine, main_job_can_run


def doctor(json_file: JsonFile = None) -> None:
    """Check whether this machine can train: packages, accelerator, communication backend and launchers.

    The table gives a fix for every problem. The exit code is 0 if training can run on this machine.
    """
    findings = examine(shared_memory_bytes(Experiment(task="pretrain"), num_ranks=1))
    print_table(
        "everest-ds doctor",
        [{"what": f.name, "status": f.status, "detail": f.detail, "fix": f.fix} for f in findings],
    )
    can_run = main_job_can_run(findings)
    typer.echo(
        "Training can run on this machine."
        if can_run
        else "Training cannot run on this machine: fix the rows with status `missing`."
    )
    write_json(json_file, {"can_run": can_run, "findings": [asdict(f) for f in findings]})
    if not can_run:
        raise typer.Exit(ExitCode.FAILURE)


def preflight(source: RecipeArg, overrides: Overrides = None, json_file: JsonFile = None) -> None:
    """Check whether the nodes of a job can train a recipe, without training.

    Start this command with srun, mpirun or torchrun, like the training itself. The nodes must have the same
    code, packages and data; the speed of their network and the disk space for checkpoints are shown.

    Example: srun --nodes=4 --ntasks-per-node=8 python -m everest_ds preflight my.yaml
    """
    check_nodes_as_rank(load_experiment(source, overrides or []), json_file)
