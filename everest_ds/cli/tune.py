"""`everest-ds tune`: search for the fastest sharding, micro-batch and recompute mode of a job."""

from __future__ import annotations

import time as clock
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everest_ds.cli.options import JsonFile, Overrides
from everest_ds.console import write_csv, write_json
from everest_ds.errors import UsageError

if TYPE_CHECKING:
    from everest_ds.config import Experiment
    from everest_ds.tuning.candidate import Candidate
    from everest_ds.tuning.candidate_tables import Costs
    from everest_ds.tuning.cluster import Cluster
    from everest_ds.tuning.search import Options, SearchResult
    from everest_ds.tuning.trials.contenders import TrialOptions

_COST, _TRIALS, _HERE = "Cost and energy", "Trials", "This machine"
OptionalRecipe = Annotated[
    str | None, typer.Argument(metavar="RECIPE", help="A recipe's name, a YAML file, or a run folder.")
]
Gpus = Annotated[int, typer.Option(min=1, help="Total number of GPUs; one rank runs on each.")]
Gpu = Annotated[
    str | None,
    typer.Option(
        help="GPU type, such as h100-80gb, a100-40gb or l40s, or a YAML file that describes one."
        " Default: this machine."
    ),
]
Nodes = Annotated[
    int | None,
    typer.Option(
        min=1, help="Nodes that hold the GPUs. Default: as few as possible, with at most 8 GPUs each."
    ),
]
GlobalBatch = Annotated[
    int | None,
    typer.Option(min=1, help="Clips per step. Default: the recipe's. Learning rates are scaled with it."),
]
Interconnect = Annotated[
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
Top = Annotated[int, typer.Option(min=1, help="Number of candidates to show.")]
Explain = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="RANK",
        help="Show every term of the candidate with this rank in the table, with its formula.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for the files of the best candidate. Default: tuned/RECIPE."),
]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", metavar="FILE", help="Also write the table of candidates as CSV.")
]
Clips = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Videos per epoch, for total times and costs. Default: counted in data.train.",
        rich_help_panel=_COST,
    ),
]
GpuHour = Annotated[
    float | None,
    typer.Option(
        "--price-per-gpu-hour", min=0, help="Price of one GPU hour, in any currency.", rich_help_panel=_COST
    ),
]
Kwh = Annotated[
    float | None,
    typer.Option(
        "--price-per-kwh",
        min=0,
        help="Price of one kWh; the GPUs are assumed to draw the maximum power of their data sheet.",
        rich_help_panel=_COST,
    ),
]
Trials = Annotated[
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
    float, typer.Option(min=1, help="Time limit of a trial on this machine.", rich_help_panel=_TRIALS)
]
Sbatch = Annotated[
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
Calibrate = Annotated[
    bool,
    typer.Option(
        "--calibrate",
        help="Measure this machine once, in about two minutes, for all later tunings. Takes no RECIPE."
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
    gpus: Gpus = 1,
    gpu: Gpu = None,
    nodes: Nodes = None,
    global_batch: GlobalBatch = None,
    interconnect: Interconnect = None,
    any_precision: AnyPrecision = False,
    top: Top = 10,
    explain: Explain = None,
    out: Out = None,
    json_file: JsonFile = None,
    csv_file: CsvFile = None,
    clips: Clips = None,
    gpu_hour: GpuHour = None,
    kwh: Kwh = None,
    trials: Trials = None,
    trial_steps: TrialSteps = 10,
    trial_seconds: TrialSeconds = 900,
    sbatch: Sbatch = None,
    what_if: AsksWhatIf = False,
    calibrate: Calibrate = False,
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
    from everest_ds.config import load_experiment
    from everest_ds.tuning.answer import print_answer, print_explained, print_question
    from everest_ds.tuning.batches import keep_global_batch
    from everest_ds.tuning.candidate_tables import Costs
    from everest_ds.tuning.trials.contenders import TrialOptions
    from everest_ds.tuning.winner import default_folder

    config = load_experiment(source, overrides or [])
    cluster = _cluster(gpu, gpus, nodes, interconnect, calibration)
    options = _options(global_batch, any_precision, overrides or [])
    costs = Costs(_num_samples(config, clips), gpu_hour, kwh)
    print_question(keep_global_batch(config, cluster.num_ranks, global_batch), cluster)
    began = clock.process_time()
    result = _search(config, cluster, options)
    print_answer(result, cluster, costs, top, clock.process_time() - began)
    if explain is not None:
        print_explained(result.ranked, explain, cluster)
    _write_tables(result, cluster, costs, json_file, csv_file)
    folder = out or default_folder(source)
    if what_if:
        _ask_what_if(config, gpu, interconnect, options, gpus, folder)
    how = None if trials is None else TrialOptions(trials, trial_steps, trial_seconds, sbatch)
    _write_best(result, how, source, overrides or [], cluster, folder)


def _calibrate(source: str | None, wanted: bool, nproc: int | None, file: Path | None) -> None:
    if not wanted:
        raise UsageError("RECIPE is missing", fix="name a recipe (everest-ds recipes), or give --calibrate")
    if source is not None:
        raise UsageError("a recipe was given with --calibrate", given=source, fix="leave out the recipe")
    from everest_ds.tuning.calibration.local_machine import calibrate

    code = calibrate(nproc, file)
    if code:
        raise typer.Exit(code)


def _cluster(
    gpu: str | None, gpus: int, nodes: int | None, interconnect: str | None, calibration: Path | None
) -> Cluster:
    from everest_ds.tuning.cluster import cluster_here, cluster_of

    return cluster_here(gpus, calibration) if gpu is None else cluster_of(gpu, gpus, nodes, interconnect)


def _options(global_batch: int | None, any_precision: bool, overrides: Sequence[str]) -> Options:
    from everest_ds.tuning.knobs import SEARCHED
    from everest_ds.tuning.search import Options

    given = {text.partition("=")[0] for text in overrides}
    return Options(global_batch, any_precision, frozenset(given & SEARCHED))


def _search(config: Experiment, cluster: Cluster, options: Options) -> SearchResult:
    from everest_ds.tuning.explain import fits_nowhere
    from everest_ds.tuning.search import search

    result = search(config, cluster, options)
    if not result.ranked:
        raise fits_nowhere(config, cluster, options, result.dropped)
    return result


def _write_tables(
    result: SearchResult, cluster: Cluster, costs: Costs, json_file: Path | None, csv_file: Path | None
) -> None:
    from everest_ds.tuning.candidate_tables import as_json, candidate_rows, dropped_rows

    rows = candidate_rows(result.ranked, cluster, costs)
    write_csv(csv_file, rows)
    found = {
        "cluster": {"ranks": cluster.num_ranks, "machine": cluster.machine.as_json()},
        "candidates": as_json(rows, result.ranked),
        "dropped": dropped_rows(result.dropped),
    }
    write_json(json_file, found)


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
        _write_winner(result.ranked[0], "rank 1", source, cluster, folder)
        return
    from everest_ds.tuning.trials.contenders import run_trials

    tried = run_trials(source, overrides, cluster, result, folder, how)
    if tried is not None:
        _write_winner(tried, f"best of the trials, {tried.name}", source, cluster, folder)


def _write_winner(winner: Candidate, title: str, source: str, cluster: Cluster, folder: Path) -> None:
    from everest_ds.tuning.winner import next_command, write_winner

    file = write_winner(winner, source, cluster, folder)
    typer.echo(f"{title}: {file}, checked by DeepSpeed and by a dry run. Next:")
    typer.echo(f"  {next_command(winner.config.task, file, cluster)}")


def _ask_what_if(
    config: Experiment, gpu: str | None, interconnect: str | None, options: Options, gpus: int, folder: Path
) -> None:
    from everest_ds.tuning.scaling import search_numbers
    from everest_ds.tuning.trials.trial_report import what_if_page, write_page

    page = what_if_page(*search_numbers(config, gpu, interconnect, options, gpus))
    typer.echo(f"what if: {write_page(folder, 'what_if', page)}")


def _num_samples(config: Experiment, clips: int | None) -> int | None:
    """Return the videos per epoch: those given, or those of the manifest or the official data set."""
    from everest_ds.training.plan import count_samples

    epoch = count_samples(config, planned=True) if clips is None else None
    return epoch.num_samples if epoch else clips
