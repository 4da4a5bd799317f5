"""`everest-ds recipes`: what can be run by name."""

from __future__ import annotations

from everest_ds.cli.output import JsonFile, print_table, write_json


def recipes(json_file: JsonFile = None) -> None:
    """List the recipes shipped with the package."""
    from everest_ds.config import load_experiment, recipe_names

    rows = []
    for name in recipe_names():
        config = load_experiment(name)
        rows.append(
            {
                "recipe": name,
                "task": config.task,
                "backbone": config.model.backbone,
                "selection": config.tokens.selection,
                "epochs": config.schedule.epochs,
            }
        )
    print_table("Recipes", rows)
    write_json(json_file, rows)
