"""The command `everest-ds keys`, which lists the config keys."""

from __future__ import annotations

from typing import Annotated

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.config.key_names import key_rows, suggest_keys
from everest_ds.console import print_table, write_json
from everest_ds.errors import UsageError

KeyWords = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[WORD]...", help="List only the keys whose names or meanings contain all these words."
    ),
]


def keys(words: KeyWords = None, json_file: JsonFile = None) -> None:
    """List the config keys, with the allowed values, the default and the meaning of each.

    Example: everest-ds keys schedule
    """
    wanted = [word.lower() for word in words or []]
    rows = [
        row for row in key_rows() if all(word in f"{row['key']} {row['meaning']}".lower() for word in wanted)
    ]
    if not rows:
        given = " ".join(words or [])
        raise UsageError("no config key has these words", given=given, allowed=suggest_keys(given))
    print_table("Config keys", rows)
    write_json(json_file, rows)
