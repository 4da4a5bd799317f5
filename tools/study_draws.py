"""Run the study of the forms of data: the accuracy that few clips of each video cost, and a frame store.

python tools/study_draws.py runs/draws              # the CPU study of docs/study.md
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from study.arms import BUSY, PLAIN
from study.draws import SCALES, SOURCES, DrawsStudy, render
from study.running import rows_of

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.console import write_json
from everest_ds.training.run_folder import describe_environment


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the study: videos, runs, table.")],
    scale: Annotated[Literal["smoke", "small"], typer.Option(help="Size of the study.")] = "small",
    jobs: Annotated[int, typer.Option(min=1, help="Number of pre-trainings to run at a time.")] = 2,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seed of the runs; repeat for several. Default: the seeds of the scale."),
    ] = None,
    data_seed: Annotated[int, typer.Option(help="Seed of the synthetic videos.")] = 1,
    arm: Annotated[
        Literal["frame store", "16 draws", "4 draws", "1 draw"] | None,
        typer.Option(help="The form of the data to compare with new clips from the files. Default: all."),
    ] = None,
    busy: Annotated[bool, typer.Option("--busy", help="Also study the busy videos.")] = False,
    table_only: Annotated[
        bool, typer.Option("--table-only", help="Only write the table, from the runs that have ended.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Pre-train and fine-tune on few draws of each video, on fresh ones, and from a store; write draws.md.

    After an interruption, the same command resumes the study. Each run has an ordinary run folder.

    Example: python tools/study_draws.py runs/draws --jobs 2
    """
    chosen = SCALES[scale] if seed is None else replace(SCALES[scale], seeds=tuple(seed))
    kinds = (PLAIN, BUSY) if busy else (PLAIN,)
    study = DrawsStudy(chosen, out, data_seed, kinds, (arm,) if arm else tuple(SOURCES))
    rows = rows_of(study, jobs, table_only)
    text = render(rows, study)
    (out / "draws.md").write_text(text)
    typer.echo(f"{text}\n{out / 'draws.md'}")
    write_json(json_file, {"environment": describe_environment(1), "rows": rows})


if __name__ == "__main__":
    run_program(main)
