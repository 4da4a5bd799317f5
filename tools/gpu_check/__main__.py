"""Run parts of the GPU check, one after the other, in this process.

    PYTHONPATH=.:tools python -m gpu_check OUT PART... [--until TIME] [--tiny]

A part is a module of this package with a function `run(record)`. It writes OUT/PART.json after every row, so
that a process which is killed loses one row. A part that fails does not take the next one with it.
"""

from __future__ import annotations

import importlib
import time
import traceback
from pathlib import Path
from typing import Annotated

import torch
import typer

from everest_ds.cli.program import run_program
from everest_ds.errors import UsageError
from gpu_check.record import Record, Session

PARTS = ("ceilings", "engine", "released", "changes", "memory", "end_to_end", "calibration")


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    parts: Annotated[list[str], typer.Argument(help=f"Any of: {', '.join(PARTS)}.")],
    until: Annotated[
        float | None, typer.Option(help="Unix time to end by, ten minutes from now by default.")
    ] = None,
    peers: Annotated[Path | None, typer.Option(help="Folder with everest/ and videomae/.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Rehearse with tiny models, on any device.")] = False,
) -> None:
    """Measure on the GPU of this machine and write JSON."""
    if unknown := [part for part in parts if part not in PARTS]:
        raise UsageError("no such part", given=unknown[0], allowed=", ".join(PARTS))
    if not tiny and not torch.cuda.is_available():
        raise UsageError("no CUDA device here", fix="--tiny rehearses on a CPU")
    session = Session(out, until or time.time() + 600, tiny, peers)
    for part in parts:
        record = Record(session, part)
        try:
            importlib.import_module(f"gpu_check.{part}").run(record)
        except Exception as error:  # the other parts can still answer their questions
            traceback.print_exc()
            record.add(part, {"error": f"{type(error).__name__}: {error}"})
        record.close()


if __name__ == "__main__":
    run_program(main)
