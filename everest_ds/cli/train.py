"""The commands `everest-ds pretrain`, `finetune` and `evaluate`, which start ranks or run as one rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from everest_ds.cli.options import DryRun, JsonFile, NumProcesses, Overrides, RecipeArg
from everest_ds.cli.ranks import evaluate_as_rank, train_as_rank
from everest_ds.config import Experiment, dump_experiment
from everest_ds.config.load import load_task
from everest_ds.console import print_facts, write_json
from everest_ds.errors import EverestError, UsageError
from everest_ds.launch.environment import detect_environment
from everest_ds.launch.local import launch_local
from everest_ds.parallel.nvme import check_nvme
from everest_ds.training.input_files import check_evaluation_inputs, check_initial_weights_exist
from everest_ds.training.plan import check_plan, count_samples, describe_plan, describe_staging
from everest_ds.training.prediction import REFERENCE, Gpus, describe_prediction, parse_gpus

PlannedGpus = Annotated[
    str | None,
    typer.Option(
        metavar="GPUS",
        help="With --dry-run: GPUs to predict memory and time for, such as 4xh100-80gb; default:"
        " 8xa100-80gb.",
    ),
]


def pretrain(
    source: RecipeArg,
    overrides: Overrides = None,
    nproc: NumProcesses = None,
    dry_run: DryRun = False,
    on: PlannedGpus = None,
    json_file: JsonFile = None,
) -> None:
    """Pre-train a masked video autoencoder on unlabelled videos.

    Repeat the command to resume an interrupted run.

    Example: everest-ds pretrain demo_pretrain --nproc 2 schedule.epochs=10 run.dir=runs/first
    """
    _train("pretrain", source, overrides or [], nproc, dry_run, on, json_file)


def finetune(
    source: RecipeArg,
    overrides: Overrides = None,
    nproc: NumProcesses = None,
    dry_run: DryRun = False,
    on: PlannedGpus = None,
    json_file: JsonFile = None,
) -> None:
    """Fine-tune a video classifier on labelled videos.

    Set model.init_from to a pre-training run to start from its weights. Repeat the command to resume an
    interrupted run.

    Example: everest-ds finetune demo_finetune --nproc 2 model.init_from=runs/first
    """
    _train("finetune", source, overrides or [], nproc, dry_run, on, json_file)


def evaluate(
    source: RecipeArg,
    overrides: Overrides = None,
    nproc: NumProcesses = None,
    dry_run: DryRun = False,
    json_file: JsonFile = None,
) -> None:
    """Test a fine-tuned classifier on several views (clips and crops) of each test video.

    The results are top-1 and top-5 accuracy, a table by class and a confusion matrix.

    Example: everest-ds evaluate runs/finetuned --nproc 2 data.test_segments=2 data.test_crops=3
    """
    config = load_task("evaluate", source, overrides or [])
    if dry_run:
        _show_plan("evaluate", config, _planned_gpus(config, nproc, None), json_file)
    elif not _started_ranks("evaluate", source, overrides or [], nproc, config, json_file):
        evaluate_as_rank(config, json_file)


def _train(
    task: str,
    source: str,
    overrides: Sequence[str],
    nproc: int | None,
    dry_run: bool,
    on: str | None,
    json_file: Path | None,
) -> None:
    config = load_task(task, source, overrides)
    if on is not None and not dry_run:
        raise UsageError(
            "--on was given without --dry-run",
            given=f"--on {on}",
            fix="add --dry-run, or replace --on by --nproc",
        )
    if dry_run:
        _show_plan(task, config, _planned_gpus(config, nproc, on), json_file)
    elif not _started_ranks(task, source, overrides, nproc, config, json_file):
        train_as_rank(config, json_file)


def _show_plan(command: str, config: Experiment, gpus: Gpus, json_file: Path | None) -> None:
    plan = {"plan": check_plan(config, gpus.count, planned=True) | describe_staging(config, command)}
    if command != "evaluate":
        epoch = count_samples(config, planned=True)
        plan["predicted"] = describe_prediction(config, gpus, epoch and epoch.num_samples)
    typer.echo(dump_experiment(config))
    for title, facts in plan.items():
        print_facts(f"{title.capitalize()}: {config.task}", facts)
    write_json(json_file, {**plan, "config": config.model_dump(mode="json")})


def _planned_gpus(config: Experiment, nproc: int | None, on: str | None) -> Gpus:
    """Return the GPUs that a dry run makes its prediction for.

    These are the GPUs named by `--on`, or as many of the reference product as the run has ranks. If the
    number of ranks is not given, the prediction is for the whole reference machine, or for one of its GPUs if
    the batch or the data set is too small for that machine.
    """
    if on is not None:
        gpus = parse_gpus(on)
        if nproc not in (None, gpus.count):
            raise UsageError(
                f"--on and --nproc name different numbers of GPUs: {gpus.count} and {nproc}",
                given=f"--on {on} --nproc {nproc}",
                fix="leave out --nproc",
            )
        return gpus
    count, reference = nproc or detect_environment().world_size, parse_gpus(REFERENCE)
    if nproc is None and count == 1:
        with suppress(EverestError):  # the batch or the data set may be too small for the reference machine
            describe_plan(config, reference.count, planned=True)
            return reference
    return Gpus(count, reference.product)


def _started_ranks(
    command: str,
    source: str,
    overrides: Sequence[str],
    nproc: int | None,
    config: Experiment,
    json_file: Path | None,
) -> bool:
    """Start the ranks on this machine if --nproc is given, and return whether it is.

    Raises:
        UsageError: if a launcher has already started this process as a rank.
        EverestError: if the run cannot start.
        typer.Exit: with the exit code of the ranks if they failed.
    """
    if nproc is None:
        return False
    if "WORLD_SIZE" in os.environ:
        raise UsageError(
            "--nproc was given, but a launcher has already started the ranks",
            given=f"WORLD_SIZE={os.environ['WORLD_SIZE']}",
            fix="leave out --nproc under torchrun, deepspeed, mpirun or srun",
        )
    if command != "evaluate":
        describe_plan(config, nproc)  # raises an error before any rank starts if the run cannot start
        check_evaluation_inputs(config)
        check_initial_weights_exist(config)
        check_nvme(config)
    json_options = [] if json_file is None else ["--json", str(json_file)]
    code = launch_local(nproc, [command, source, *overrides, *json_options], log_dir=config.run.dir / "logs")
    if code:
        raise typer.Exit(code)
    return True
