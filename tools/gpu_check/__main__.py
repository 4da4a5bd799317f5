"""Run one part of the GPU check.

    PYTHONPATH=.:tools python -m gpu_check OUT PART [--until TIME] [--tiny]

A part is a module of this package with a function `run(record)`. It writes OUT/PART.json after every row, so
that a killed process loses one row. Each part runs in a process of its own, because a crash of the driver
must not end other parts, and because DeepSpeed keeps the first world of a process.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from everest_ds.cli.program import run_program
from everest_ds.errors import UsageError, nearest
from gpu_check.record import Record, Session

PARTS = ("ceilings", "engine", "released", "changes", "replay", "memory", "end_to_end", "calibration")


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the results.")],
    part: Annotated[str, typer.Argument(help=f"One of: {', '.join(PARTS)}.")],
    until: Annotated[
        float | None, typer.Option(help="Unix time to end by; default: ten minutes from now.")
    ] = None,
    peers: Annotated[Path | None, typer.Option(help="Folder with everest/ and videomae/.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Rehearse with tiny models, on any device.")] = False,
) -> None:
    """Run one part on the GPU of this machine and write its JSON."""
    if part not in PARTS:
        raise UsageError("unknown part", given=part, allowed=nearest(part, PARTS))
    if not tiny and not torch.cuda.is_available():
        raise UsageError("no CUDA device on this machine", fix="--tiny rehearses on a CPU")
    record = Record(Session(out, until or time.time() + 600, tiny, peers), part)
    try:
        importlib.import_module(f"gpu_check.{part}").run(record)
    except Exception as error:  # the results must show the error too
        record.add(part, {"error": f"{type(error).__name__}: {error}"})
        raise
    finally:
        record.close()


if __name__ == "__main__":
    run_program(main)
