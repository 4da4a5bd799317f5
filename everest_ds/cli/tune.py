"""`everest-ds tune`: with which sharding, micro-batch and recompute mode a job should run."""

from __future__ import annotations

import time as clock
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everest_ds.cli.output import JsonFile, print_table
from everest_ds.cli.train import Overrides, Source
from everest_ds.errors import UsageError

if TYPE_CHECKING:
    from everest_ds.cli.tune_tables import Costs
    from everest_ds.config import Experiment
    from everest_ds.tuning.search import Cluster, SearchResult

_COST = "Cost and energy"
Gpus = Annotated[int, typer.Option(min=1, help="GPUs in all, one rank each.")]
Gpu = Annotated[
    str | None,
    typer.Option(help="Such as h100-80gb, a100-40gb, l40s; or a YAML file with a device's numbers."),
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
    from everest_ds.cli.tune_tables import Costs
    from everest_ds.config import load_experiment
    from everest_ds.tuning.search import Options, search
    from everest_ds.tuning.space import SEARCHED

    config = load_experiment(source, overrides or [])
    cluster = _cluster(gpu, gpus, nodes, interconnect)
    given = {text.partition("=")[0] for text in overrides or []}
    options = Options(global_batch, any_precision, frozenset(given & SEARCHED))
    costs = Costs(_num_samples(config, clips), gpu_hour, kwh)
    began = clock.process_time()
    result = search(config, cluster, options)
    _show(result, cluster, costs, top, clock.process_time() - began)


def _cluster(gpu: str | None, gpus: int, nodes: int | None, interconnect: str | None) -> Cluster:
    from everest_ds.cli.tune_cluster import cluster_of

    if gpu is None:
        raise UsageError("--gpu is missing", fix="say which, such as --gpu h100-80gb")
    return cluster_of(gpu, gpus, nodes, interconnect)


def _num_samples(config: Experiment, clips: int | None) -> int | None:
    """Videos of an epoch: as given, or counted if the manifest is here."""
    data, labelled = config.data, config.task == "finetune"
    if clips is not None or data.train is None or not data.train.is_file():
        return clips
    from everest_ds.data.manifest import read_manifest

    return len(
        read_manifest(data.train, root=data.root, num_classes=config.model.num_classes, labelled=labelled)
    )


def _show(result: SearchResult, cluster: Cluster, costs: Costs, top: int, seconds: float) -> None:
    from everest_ds.cli.tune_tables import candidate_rows, dropped_rows
    from everest_ds.tuning.reasons import slower_families

    shown = result.ranked[:top]
    print_table("Candidates (predicted)", candidate_rows(shown, cluster, costs))
    slower = slower_families(result.ranked, top)
    print_table("Not shown", dropped_rows([*slower, *result.dropped]))
