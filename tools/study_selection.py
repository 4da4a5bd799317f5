"""Run the study of token selection: train with every selection on synthetic videos and compare accuracies.

python tools/study_selection.py runs/study                  # the CPU study of docs/study.md
python tools/study_selection.py runs/large --scale large    # on a GPU
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer
from study.arms import KINDS
from study.kept import object_shares
from study.protocol import SCALES, Study
from study.report import draw, render
from study.running import rows_of

from everest_ds.cli.options import JsonFile
from everest_ds.cli.program import run_program
from everest_ds.console import write_json
from everest_ds.training.run_folder import describe_environment


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the study: videos, runs, table, plot.")],
    scale: Annotated[
        Literal["smoke", "small", "large"],
        typer.Option(help="Size of the study: model, videos, seeds and steps."),
    ] = "small",
    jobs: Annotated[
        int,
        typer.Option(min=1, help="Number of pre-trainings, each with its fine-tunings, to run at a time."),
    ] = 2,
    seed: Annotated[
        list[int] | None,
        typer.Option(help="Seed of the runs; repeat for several. Default: the seeds of the scale."),
    ] = None,
    data_seed: Annotated[int, typer.Option(help="Seed of the synthetic videos.")] = 1,
    table_only: Annotated[
        bool,
        typer.Option(
            "--table-only", help="Only write the table and the plot, from the runs that have ended."
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Train with every way to choose tokens on synthetic motion; write study.md and study.png.

    After an interruption, the same command resumes the study. Each run has an ordinary run folder.

    Example: python tools/study_selection.py runs/study --jobs 2
    """
    chosen = SCALES[scale] if seed is None else replace(SCALES[scale], seeds=tuple(seed))
    study = Study(chosen, out, data_seed)
    rows = rows_of(study, jobs, table_only)
    shares = {kind: object_shares(study, kind) for kind in KINDS if study.has_data(kind)}
    text = render(rows, study.num_runs, shares)
    (out / "study.md").write_text(text)
    (out / "study.png").write_bytes(draw(rows))
    typer.echo(f"{text}\n{out / 'study.md'}, {out / 'study.png'}")
    write_json(json_file, {"environment": describe_environment(1), "rows": rows, "object_shares": shares})


if __name__ == "__main__":
    run_program(main)
