"""A command that checks, before it begins, that its results are not written over another file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.core import TyperCommand

from everest_ds.errors import UsageError
from everest_ds.output_paths import refuse_input

_OUTPUTS = ("json_file", "csv_file")


class CarefulCommand(TyperCommand):
    """A command whose options `--json` and `--csv` may replace earlier results, but no other file."""

    def invoke(self, ctx: Any) -> Any:
        """Check the files that the command will write, then run it.

        Raises:
            UsageError: if another argument names one of them, or if the JSON file exists and is not JSON.
        """
        words = [word for name, value in ctx.params.items() if name not in _OUTPUTS for word in _words(value)]
        inputs = {Path(word).resolve() for word in words if os.path.isfile(word)}
        for name in _OUTPUTS:
            if (file := ctx.params.get(name)) is not None:
                refuse_input(file, inputs)
        file = ctx.params.get("json_file")
        if file is not None and file.is_file():
            with file.open("rb") as stream:
                is_json = stream.read(1) in (b"", b"{", b"[")
            if not is_json:
                raise UsageError(
                    f"{file}: this file exists and is not JSON", fix="choose another file to write"
                )
        return super().invoke(ctx)


def _words(value: object) -> Iterator[str]:
    """Yield the texts of an argument that may name files: a path, or the value of a `KEY=PATH`."""
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, str | Path):
            yield str(item)
            yield str(item).partition("=")[2]
