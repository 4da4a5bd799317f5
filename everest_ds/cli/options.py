"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    pass

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
On = Annotated[
    str | None,
    typer.Option(
        metavar="GPUS",
        help="With --dry-run: GPUs to predict memory and time for, such as 4xH100; default: 8xA100-80GB.",
    ),
]

JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the results to FILE as JSON.")
]
