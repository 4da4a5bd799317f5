"""`everest-ds tune`: search for the fastest sharding, micro-batch and recompute mode of a job."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from everest_ds.cli.options import CsvFile, JsonFile, Overrides
from everest_ds.config import load_experiment
from everest_ds.errors import UsageError
from everest_ds.training.plan import count_samples
from everest_ds.tuning.answer import (
    helpful_workers,
    print_answer,
    print_explained,
    print_question,
    write_tables,
)
from everest_ds.tuning.batches import keep_global_batch
from everest_ds.tuning.calibration.local_machine import calibrate as calibrate_machine
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.candidate_tables import Costs
from everest_ds.tuning.cluster import Cluster, cluster_here, cluster_of
from everest_ds.tuning.explain import fits_nowhere
from everest_ds.tuning.knobs import SEARCHED
from everest_ds.tuning.own_file import check_own_file
from everest_ds.tuning.scaling import search_numbers
from everest_ds.tuning.search import Options, SearchResult, search
from everest_ds.tuning.trials.contenders import TrialOptions, run_trials
from everest_ds.tuning.trials.trial_report import what_if_page, write_page
from everest_ds.tuning.winner import default_folder, next_command, write_winner

_COST, _TRIALS, _HERE = "Cost and energy", "Trials", "This machine"
OptionalRecipe = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, a YAML file, or a run folder.")
]
TotalGpus = Annotated[int, typer.Option(min=1, help="Total number of GPUs; one rank runs on each.")]
GpuType = Annotated[
    str | None,
    typer.Option(
        help="GPU type, such as h100-80gb, a100-40gb or l40s, or a YAML file that describes one."
        " Default: this machine."
    ),
]
GpuNodes = Annotated[
    int | None,
    typer.Option(min=1, help="Number of nodes. Default: as few as possible, with at most 8 GPUs each."),
]
GlobalBatchSize = Annotated[
    int | None,
    typer.Option(min=1, help="Clips per step. Default: the recipe's. Learning rates are scaled with it."),
]
NetworkKind = Annotated[
    str | None,
    typer.Option(
        help="Network between nodes: number and kind of adapters per node, such as 8xib-ndr, roce-100 or"
        " ethernet-25."
    ),
]
AnyPrecision = Annotated[
    bool,
    typer.Option(
        "--any-precision",
        help="Also try the other precisions of the GPU; their rounding differs from the recipe's.",
    ),
]
NumShown = Annotated[int, typer.Option(min=1, help="Number of candidates to show.")]
ExplainRank = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="RANK",
        help="Explain the candidate with this rank: its memory by category, and each part of its step with"
        " the formula.",
    ),
]
WinnerFolder = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for the files of the best candidate. Default: tuned/RECIPE."),
]
ClipsPerEpoch = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Videos per epoch, for total times and costs. Default: counted in data.train.",
        rich_help_panel=_COST,
    ),
]
GpuHourPrice = Annotated[
    float | None,
    typer.Option(
        "--price-per-gpu-hour", min=0, help="Price of one GPU hour, in any currency.", rich_help_panel=_COST
    ),
]
KwhPrice = Annotated[
    float | None,
    typer.Option(
        "--price-per-kwh",
        min=0,
        help="Price of one kWh; the GPUs are assumed to draw the maximum power of their data sheet.",
        rich_help_panel=_COST,
    ),
]
NumTrials = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help="Run the best K candidates and two baselines for a few steps, then rank them by measurement.",
        rich_help_panel=_TRIALS,
    ),
]
TrialSteps = Annotated[int, typer.Option(min=5, help="Steps per trial.", rich_help_panel=_TRIALS)]
TrialSeconds = Annotated[
    float,
    typer.Option(min=1, help="Time limit of a trial on this machine, in seconds.", rich_help_panel=_TRIALS),
]
TrialSbatch = Annotated[
    str | None,
    typer.Option(
        metavar="OPTIONS",
        help='Run the trials as an array job with these sbatch options, such as "--time=30:00 -p gpu".'
        " Default: on this machine.",
        rich_help_panel=_TRIALS,
    ),
]
AsksWhatIf = Annotated[
    bool,
    typer.Option("--what-if", help="Write a page that shows which choices pay off on 1 to 1,024 GPUs."),
]
Calibrates = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Measure this machine once, in about two minutes, for all later uses of tune. Takes no RECIPE."
        " Under srun, it measures the ranks that srun started.",
        rich_help_panel=_HERE,
    ),
]
MostRanks = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        metavar="N",
        help="Measure up to N ranks. Default: one per GPU, or one per core if there is no GPU.",
        rich_help_panel=_HERE,
    ),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="File of the measurements of this machine. Default: in the user's cache.",
        rich_help_panel=_HERE,
    ),
]


def tune(
    source: OptionalRecipe = None,
    overrides: Overrides = None,
    gpus: TotalGpus = 1,
    gpu: GpuType = None,
    nodes: GpuNodes = None,
    global_batch: GlobalBatchSize = None,
    interconnect: NetworkKind = None,
    any_precision: AnyPrecision = False,
    top: NumShown = 10,
    explain: ExplainRank = None,
    out: WinnerFolder = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    clips: ClipsPerEpoch = None,
    gpu_hour: GpuHourPrice = None,
    kwh: KwhPrice = None,
    trials: NumTrials = None,
    trial_steps: TrialSteps = 10,
    trial_seconds: TrialSeconds = 900,
    sbatch: TrialSbatch = None,
    what_if: AsksWhatIf = False,
    calibrate: Calibrates = False,
    nproc: MostRanks = None,
    calibration: CalibrationFile = None,
) -> None:
    """Predict the fastest way to run a recipe on a cluster, with reasons; takes seconds and needs no GPU.

    The search covers ZeRO stage, tensor parallelism, micro-batch, recompute, offload and bucket sizes. None
    of them changes what the model learns. A setting that you give, such as parallelism.tensor=2, is kept.

    Example: everest-ds tune k400_pretrain_vit_base model.backbone=vit_huge --gpus 64 --gpu h100-80gb
    """
    if source is None or calibrate:
        _calibrate(source, calibrate, nproc, calibration)
        return
    settings = overrides or []
    config = load_experiment(source, settings)
    cluster = cluster_here(gpus, calibration) if gpu is None else cluster_of(gpu, gpus, nodes, interconnect)
    cluster = cluster.loading_data_of(config)
    given = {text.partition("=")[0] for text in settings}
    options = Options(global_batch, any_precision, frozenset(given & SEARCHED))
    epoch = None if clips else count_samples(config, planned=True)
    costs = Costs(epoch.num_samples if epoch else clips, gpu_hour, kwh)
    kept = keep_global_batch(config, cluster.num_ranks, global_batch)
    print_question(kept, cluster, check_own_file(kept, options, costs.num_samples))
    began = clock.process_time()
    result = search(config, cluster, options)
    if not result.ranked:
        raise fits_nowhere(config, cluster, options, result.dropped)
    print_answer(result, cluster, costs, top, clock.process_time() - began)
    if explain is not None:
        print_explained(result.ranked, explain, cluster)
    write_tables(result, cluster, costs, json_file, csv_file)
    folder = out or default_folder(source)
    if what_if:
        page = what_if_page(*search_numbers(config, gpu, interconnect, options, gpus))
        typer.echo(f"what if: {write_page(folder, 'what_if', page)}")
    how = None if trials is None else TrialOptions(trials, trial_steps, trial_seconds, sbatch)
    _write_best(result, how, source, settings, cluster, folder)


def _calibrate(source: str | None, wanted: bool, nproc: int | None, file: Path | None) -> None:
    if not wanted:
        raise UsageError("RECIPE is missing", fix="name a recipe (everest-ds recipes), or give --calibrate")
    if source is not None:
        raise UsageError("a recipe was given with --calibrate", given=source, fix="leave out the recipe")
    code = calibrate_machine(nproc, file)
    if code:
        raise typer.Exit(code)


def _write_best(
    result: SearchResult,
    how: TrialOptions | None,
    source: str,
    overrides: Sequence[str],
    cluster: Cluster,
    folder: Path,
) -> None:
    """Write the files of the best candidate, by prediction or, once the trials have ended, by measurement."""
    if how is None:
        _write_winner(result.ranked[0], "candidate 1", source, cluster, folder)
        return
    tried = run_trials(source, overrides, cluster, result, folder, how)
    if tried is not None:
        _write_winner(tried, f"best of the trials, {tried.name}", source, cluster, folder)


def _write_winner(winner: Candidate, title: str, source: str, cluster: Cluster, folder: Path) -> None:
    file = write_winner(winner, source, cluster, folder)
    typer.echo(f"{title}: {file}, checked by DeepSpeed and by a dry run. Next:")
    workers = helpful_workers(winner, cluster)
    typer.echo(f"  {next_command(winner.config.task, file, cluster, workers)}")
