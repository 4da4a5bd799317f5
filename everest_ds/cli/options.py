"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from everest_ds.launch.local import available_cores

RecipeArg = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Config of the run: a recipe's name (see everest-ds recipes), a YAML file, or a run folder.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...", help="Settings to change, such as batch.micro_batch_size=4."
    ),
]
NumProcesses = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        min=1,
        help="Number of ranks (processes) to start on this machine, one per GPU. Leave this out under"
        " torchrun or srun, which start the ranks themselves.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check the run without starting it: print the resolved config and the plan and, for training,"
        " the predicted memory and time.",
    ),
]
ManifestArg = Annotated[Path, typer.Argument(help="Text file with one `path label` line per video.")]
ManifestRoot = Annotated[
    Path | None,
    typer.Option(
        "--root", help="Folder that relative paths start from; default: the folder of the manifest."
    ),
]
ShortSide = Annotated[
    int, typer.Option(min=32, help="Length of the shorter side, in pixels; smaller videos are not enlarged.")
]
NUM_CORES = available_cores()
Workers = Annotated[int, typer.Option(min=1, help="Number of worker processes.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the results to FILE as JSON.")
]
CsvFile = Annotated[
    Path | None, typer.Option("--csv", metavar="FILE", help="Also write the results to FILE as CSV.")
]
