"""`everest-ds tune`: with which sharding, micro-batch and recompute mode a job should run."""

from __future__ import annotations

import time as clock
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everest_ds.cli.output import JsonFile, write_csv, write_json
from everest_ds.cli.train import Overrides, Source

if TYPE_CHECKING:
    from everest_ds.cli.tune_tables import Costs
    from everest_ds.config import Experiment
    from everest_ds.tuning.search import Cluster, Options, SearchResult

_COST = "Cost and energy"
Gpus = Annotated[int, typer.Option(min=1, help="GPUs in all, one rank each.")]
Gpu = Annotated[
    str | None,
    typer.Option(
        help="Such as h100-80gb, a100-40gb, l40s; or a YAML file of its numbers. Default: this machine."
    ),
]
Nodes = Annotated[
    int | None, typer.Option(min=1, help="Nodes that they are on. Default: as few as hold 8 each.")
]
GlobalBatch = Annotated[
    int | None, typer.Option(min=1, help="Clips of a step. Default: the recipe's; learning rates follow it.")
]
Interconnect = Annotated[
    str | None,
    typer.Option(
        help="Between nodes: adapters a node and their kind, such as 8xib-ndr, roce-100, ethernet-25."
    ),
]
AnyPrecision = Annotated[
    bool, typer.Option("--any-precision", help="Try all that the device has; rounding differs.")
]
Top = Annotated[int, typer.Option(min=1, help="Candidates to show.")]
Explain = Annotated[
    int | None,
    typer.Option(min=1, metavar="RANK", help="Show each term of this candidate, with its formula."),
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="For the winner's files. Default: tuned/RECIPE.")
]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", metavar="FILE", help="Also write the table of candidates as CSV.")
]
Clips = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Videos of an epoch, for total times. Default: counted in data.train.",
        rich_help_panel=_COST,
    ),
]
GpuHour = Annotated[float | None, typer.Option("--price-per-gpu-hour", min=0, rich_help_panel=_COST)]
Kwh = Annotated[float | None, typer.Option("--price-per-kwh", min=0, rich_help_panel=_COST)]


def tune(
    source: Source,
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
) -> None:
    """Predict the fastest way to run a recipe on a cluster, in seconds and without a GPU, and say why.

    ZeRO stage, tensor parallelism, micro-batch, recompute, offload and buckets are searched; what is learned
    stays the same. A key that you give, such as parallelism.tensor=2, stays as you give it.

    Example: everest-ds tune k400_pretrain_vit_base model.backbone=vit_huge --gpus 64 --gpu h100-80gb
    """
    from everest_ds.cli.tune_show import print_answer, print_explained, print_question
    from everest_ds.cli.tune_tables import Costs
    from everest_ds.config import load_experiment
    from everest_ds.tuning.batches import keep_global_batch
    from everest_ds.tuning.search import Options
    from everest_ds.tuning.space import SEARCHED

    config = load_experiment(source, overrides or [])
    cluster = _cluster(gpu, gpus, nodes, interconnect)
    given = {text.partition("=")[0] for text in overrides or []}
    options = Options(global_batch, any_precision, frozenset(given & SEARCHED))
    costs = Costs(_num_samples(config, clips), gpu_hour, kwh)
    print_question(keep_global_batch(config, cluster.num_ranks, global_batch), cluster)
    began = clock.process_time()
    result = _search(config, cluster, options)
    print_answer(result, cluster, costs, top, clock.process_time() - began)
    if explain is not None:
        print_explained(result.ranked, explain, cluster)
    _write(result, source, cluster, costs, out, json_file, csv_file)


def _cluster(gpu: str | None, gpus: int, nodes: int | None, interconnect: str | None) -> Cluster:
    from everest_ds.cli.tune_cluster import cluster_here, cluster_of

    return cluster_here(gpus) if gpu is None else cluster_of(gpu, gpus, nodes, interconnect)


def _search(config: Experiment, cluster: Cluster, options: Options) -> SearchResult:
    from everest_ds.tuning.nearest import fits_nowhere
    from everest_ds.tuning.search import search

    result = search(config, cluster, options)
    if not result.ranked:
        raise fits_nowhere(config, cluster, options, result.dropped)
    return result


def _write(
    result: SearchResult,
    source: str,
    cluster: Cluster,
    costs: Costs,
    out: Path | None,
    json_file: Path | None,
    csv_file: Path | None,
) -> None:
    from everest_ds.cli.tune_tables import as_json, candidate_rows, dropped_rows
    from everest_ds.cli.tune_winner import default_folder, next_command, write_winner

    rows, winner = candidate_rows(result.ranked, cluster, costs), result.ranked[0]
    write_csv(csv_file, rows)
    found = {
        "cluster": {"ranks": cluster.num_ranks, "machine": cluster.machine.as_json()},
        "candidates": as_json(rows, result.ranked, cluster.machine),
        "dropped": dropped_rows(result.dropped),
    }
    write_json(json_file, found)
    file = write_winner(winner, source, cluster, out or default_folder(source))
    typer.echo(f"rank 1: {file}, held against DeepSpeed's own checks and a dry run. Next:")
    typer.echo(f"  {next_command(winner.config.task, file, cluster)}")


def _num_samples(config: Experiment, clips: int | None) -> int | None:
    """Videos of an epoch: as given, or counted if the manifest is here."""
    data, labelled = config.data, config.task == "finetune"
    if clips is not None or data.train is None or not data.train.is_file():
        return clips
    from everest_ds.data.manifest import read_manifest

    return len(
        read_manifest(data.train, root=data.root, num_classes=config.model.num_classes, labelled=labelled)
    )
