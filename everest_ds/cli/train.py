"""The commands `everest-ds pretrain`, `finetune` and `evaluate`, which start ranks or run as one rank."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from everest_ds.cli.options import DryRun, JsonFile, NumProcesses, On, Overrides, RecipeArg
from everest_ds.cli.ranks import in_world
from everest_ds.config.load import load_for_task
from everest_ds.console import print_facts, print_table, write_json
from everest_ds.errors import EverestError, UsageError
from everest_ds.training.plan import check_plan

if TYPE_CHECKING:
    from everest_ds.config import Experiment
    from everest_ds.parallel.world import World
    from everest_ds.training.prediction import Gpus
    from everest_ds.training.throughput import ClipCost


def pretrain(
    source: RecipeArg,
    overrides: Overrides = None,
    nproc: NumProcesses = None,
    dry_run: DryRun = False,
    on: On = None,
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
    on: On = None,
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
    config = load_for_task("finetune", source, overrides or [])
    if dry_run:
        _show_plan(config, _planned_gpus(config, nproc, None), json_file, trains=False)
    elif not _started_ranks("evaluate", source, overrides or [], nproc, config, json_file):
        in_world(config, lambda world: _evaluate(config, world, json_file))


def _train(
    task: str,
    source: str,
    overrides: Sequence[str],
    nproc: int | None,
    dry_run: bool,
    on: str | None,
    json_file: JsonFile,
) -> None:
    config = load_for_task(task, source, overrides)
    if on is not None and not dry_run:
        raise UsageError(
            "--on was given without --dry-run",
            given=f"--on {on}",
            fix="add --dry-run, or replace --on by --nproc",
        )
    if dry_run:
        _show_plan(config, _planned_gpus(config, nproc, on), json_file)
        return
    if _started_ranks(task, source, overrides, nproc, config, json_file):
        return
    in_world(config, lambda world: _train_here(config, world, json_file))


def _show_plan(config: Experiment, gpus: Gpus, json_file: JsonFile, trains: bool = True) -> None:
    from everest_ds.config import dump_experiment
    from everest_ds.training.plan import count_samples
    from everest_ds.training.prediction import describe_prediction

    plan = {"plan": check_plan(config, gpus.count, planned=True)}
    if trains:
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
    from everest_ds.launch.environment import detect_environment
    from everest_ds.training.prediction import REFERENCE, Gpus, parse_gpus

    if on is not None:
        gpus = parse_gpus(on)
        if nproc not in (None, gpus.count):
            raise UsageError(
                "--on and --nproc name different numbers of GPUs",
                given=f"--on {on} --nproc {nproc}",
                fix="leave out --nproc",
            )
        return gpus
    count, reference = nproc or detect_environment().world_size, parse_gpus(REFERENCE)
    if nproc is None and count == 1 and _can_plan(config, reference.count):
        return reference
    return Gpus(count, reference.product)


def _can_plan(config: Experiment, num_ranks: int) -> bool:
    from everest_ds.training.plan import describe_plan

    try:
        describe_plan(config, num_ranks, planned=True)
    except EverestError:
        return False
    return True


def _started_ranks(
    command: str,
    source: str,
    overrides: Sequence[str],
    nproc: int | None,
    config: Experiment,
    json_file: JsonFile,
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
    from everest_ds.launch.local import launch_local
    from everest_ds.training.plan import describe_plan

    if command != "evaluate":
        from everest_ds.parallel.nvme import check_nvme

        describe_plan(config, nproc)  # raises an error before any rank starts if the run cannot start
        check_nvme(config)
    json_options = [] if json_file is None else ["--json", str(json_file)]
    code = launch_local(nproc, [command, source, *overrides, *json_options], log_dir=config.run.dir / "logs")
    if code:
        raise typer.Exit(code)
    return True


def _train_here(config: Experiment, world: World, json_file: JsonFile) -> None:
    from everest_ds.jobs.requeue import current_job
    from everest_ds.training.loop import train
    from everest_ds.training.plan import describe_plan
    from everest_ds.training.preflight import check_nodes

    facts = describe_plan(config, world.size, ranks_per_node=world.local_size)
    if world.is_main:
        print_facts(f"{config.task}: {config.run.dir}", facts)
        write_json(json_file, {"plan": facts})
    job = current_job()
    if job is not None:
        checked = check_nodes(config, world)
        if world.is_main:
            print_facts(f"preflight: {job.nodes}", checked)
    train(config, world, _clip_cost(config, world), None if job is None else job.signal_s)
    if world.is_main:
        typer.echo(f"finished: {config.run.dir}; to see the curves: tensorboard --logdir {config.run.dir}")


def _clip_cost(config: Experiment, world: World) -> ClipCost:
    from everest_ds.costs.compute import FLOPS_PER_MAC, predict_macs
    from everest_ds.costs.hardware.gpus import peak_flops_per_s
    from everest_ds.profiling.step_measurement import compute_dtype, device_name
    from everest_ds.training.throughput import ClipCost

    dtype = compute_dtype(config.precision, world.device)
    peak = peak_flops_per_s(device_name(world.device), dtype)
    return ClipCost(FLOPS_PER_MAC * predict_macs(config).training_macs, peak)


def _evaluate(config: Experiment, world: World, json_file: JsonFile) -> None:
    from everest_ds.training.evaluate import run_test

    result = run_test(config, world)
    if not world.is_main:
        return
    summary: dict[str, Any] = {k: v for k, v in result.items() if k not in ("classes", "missing")}
    print_table("By class", result["classes"])
    print_facts(f"evaluate: {config.run.dir}", summary)
    write_json(json_file, result)
