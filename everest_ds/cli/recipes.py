"""The command `everest-ds recipes`, which lists the configs shipped with the package."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.config import load_experiment, recipe_names
from everest_ds.console import print_table, write_json
from everest_ds.errors import UsageError, nearest

NameParts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[WORD]...", help="List only the recipes whose names contain all these words."),
]


def recipes(words: NameParts = None, json_file: JsonFile = None) -> None:
    """List the recipes, the ready-made configs shipped with the package, by data set and task.

    Example: everest-ds recipes k400 vit_base
    """
    wanted, every = words or [], recipe_names()
    names = [name for name in every if all(word in name for word in wanted)]
    if not names:
        given, datasets = " ".join(wanted), {name.split("_")[0] for name in every}
        raise UsageError("no such recipe", given=given, allowed=nearest(given, {*every, *datasets}))
    rows = [_row(name) for name in names]
    print_table("Recipes (tokens: how many of a clip are kept, and the rule tokens.selection)", rows)
    write_json(json_file, rows)


def _row(name: str) -> dict[str, Any]:
    config = load_experiment(name)
    return {
        "recipe": name,
        "tokens": f"{config.token_counts.num_kept} {config.tokens.selection}",
        "epochs": config.schedule.epochs,
        "batch": config.batch.global_batch_size or "any",
        "base_lr": f"{config.schedule.base_lr:g}",
    }
