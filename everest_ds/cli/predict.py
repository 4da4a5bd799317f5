"""The commands `everest-ds features` and `everest-ds predict`, which apply a trained model to videos."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.console import (
    print_facts,
    print_table,
    progress_of,
    write_csv,
    write_json,
)
from everest_ds.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from everest_ds.data.ledger import Problem
    from everest_ds.inference.views import Views

Model = Annotated[
    Path,
    typer.Option(
        "--model",
        help="The trained model: a run folder, a checkpoint, a .safetensors file, a .pth file of VideoMAE,"
        " EVEREST, MVD or MME, or a folder of transformers' VideoMAE.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="Settings to change, such as data.frame_stride=2 or tokens.keep_ratio=0.6.",
    ),
]
Segments = Annotated[
    int, typer.Option(min=1, help="Number of clips from different times of a video; results are averaged.")
]
Workers = Annotated[int, typer.Option(min=0, help="Number of processes that decode videos.")]
CORES = min(8, os.cpu_count() or 1)
_PLACES = ("second", "third", "fourth", "fifth")
Crops = Annotated[
    int, typer.Option(min=1, help="Number of crops at different positions of a clip; results are averaged.")
]


def features(
    videos: Annotated[
        Path, typer.Argument(help="A folder of videos, searched recursively, or a manifest of videos.")
    ],
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", help="File to write: .npz, or .parquet if pyarrow is installed.")
    ],
    overrides: Overrides = None,
    segments: Segments = 1,
    crops: Crops = 1,
    workers: Workers = CORES,
    json_file: JsonFile = None,
) -> None:
    """Write one feature vector per video: the mean of the encoder's output over the tokens that it keeps.

    The file has the columns video, label (from a manifest, otherwise -1) and features. Repeat the command to
    resume an interrupted run. Videos that cannot be read are left out, listed and recorded in
    OUT.ledger.jsonl; the exit code is then 3.

    Example: everest-ds features my_videos --model runs/pre --out features.npz
    """
    from everest_ds.data.video_list import list_samples
    from everest_ds.inference.feature_table import check_table_file
    from everest_ds.inference.features import extract

    check_table_file(out)
    samples = list_samples(videos)
    settings = [f"data.num_workers={workers}", *(overrides or [])]
    network = _load(model, settings, features=True)
    with progress_of("reading videos", len(samples)) as on_progress:
        done = extract(
            network,
            samples,
            videos if videos.is_dir() else videos.parent,
            out,
            _views(segments, crops),
            on_progress,
        )
    facts = {
        "videos": 0 if done.table is None else len(done.table.video),
        "there_already": done.num_known,
        "left_out": len(done.problems),
        "features": "none" if done.table is None else f"{done.table.features.shape[1]} per video, float32",
        "tokens": _tokens(network.config),
    }
    print_facts(f"{out}", facts)
    problems = _problem_rows(done.problems)
    write_json(json_file, {**facts, "problems": problems})
    _end_with(problems, len(samples))


def predict(
    videos: Annotated[
        Path,
        typer.Argument(help="A video, a folder of videos, searched recursively, or a manifest of videos."),
    ],
    model: Model,
    overrides: Overrides = None,
    segments: Segments = 1,
    crops: Crops = 1,
    classes: Annotated[
        Path | None,
        typer.Option(help="Text file with one class name per line, in the order of the labels."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            help="Single video: picture of the kept tokens to write; default: VIDEO.kept.png in the current"
            " folder."
        ),
    ] = None,
    workers: Workers = CORES,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", metavar="FILE", help="Also write the results to FILE, one line per video."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Predict the five most probable classes of each video; for a single video, also draw the kept tokens.

    Videos that cannot be read are listed, and the exit code is then 3.

    Example: everest-ds predict clip.mp4 --model runs/fine
    """
    from everest_ds.data.video_list import list_samples
    from everest_ds.inference import predictions as inference

    samples = list_samples(videos)
    single = len(samples) == 1
    network = _load(model, [f"data.num_workers={0 if single else workers}", *(overrides or [])])
    names = _class_names(network, classes)
    views = _views(segments, crops)
    with progress_of("predicting", len(samples) * views.num_views) as on_progress:
        done = inference.predict_videos(network, samples, views, on_progress)
    best = {samples[index].name: _best(row, names) for index, row in done.probabilities.items()}
    if single and best:
        print_table(f"{videos}", next(iter(best.values())))
        _draw_kept(network, samples[0].path, picture or Path(f"{videos.stem}.kept.png"))
    elif best:
        print_table(f"{len(best)} videos of {videos}", [_line(video, rows) for video, rows in best.items()])
    write_csv(csv_file, [_line(video, rows) for video, rows in best.items()])
    problems = _problem_rows(done.problems)
    write_json(json_file, {"videos": best, "problems": problems})
    _end_with(problems, len(samples))


def _best(probabilities: Any, names: list[str]) -> list[dict[str, Any]]:
    labels = probabilities.argsort()[::-1][:5]
    return [{"class": names[i], "probability_pct": round(100 * float(probabilities[i]), 2)} for i in labels]


def _line(video: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "video": video,
        **rows[0],
        **{f"{place}": row["class"] for place, row in zip(_PLACES, rows[1:], strict=False)},
    }


def _draw_kept(network: Any, video: Path, file: Path) -> None:
    from matplotlib.image import imsave  # imported late, because importing matplotlib is slow

    from everest_ds.inference.predictions import see
    from everest_ds.reports.kept_tokens import draw_kept

    sight = see(network, video)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        imsave(file, draw_kept(*sight))
    except OSError as error:
        raise UsageError(f"{file}: cannot write the picture", given=error.strerror) from None
    typer.echo(f"{file}: {sight.kept_Thw.mean():.0%} of the tokens are kept ({_tokens(network.config)})")


def _problem_rows(problems: list[Problem]) -> list[dict[str, Any]]:
    return [{"video": problem.sample.name, "problem": problem.reason} for problem in problems]


def _end_with(problems: list[dict[str, Any]], num_videos: int) -> None:
    if problems:
        print_table(f"{len(problems)} of {num_videos} videos cannot be read", problems)
        raise typer.Exit(ExitCode.DATA)


def _load(model: Path, overrides: list[str], features: bool = False) -> Any:
    from everest_ds.inference.views import best_device
    from everest_ds.interchange.load_model import load_model

    return load_model(model, *overrides, features=features).to(best_device())


def _views(segments: int, crops: int) -> Views:
    from everest_ds.inference.views import Views

    return Views(segments, crops)


def _tokens(config: Any) -> str:
    return f"{config.tokens.selection}, {config.token_counts.num_kept} of {config.token_counts.num_tokens}"


def _class_names(model: Any, file: Path | None) -> list[str]:
    """Return the class names from the file, else from the model, else names made of class numbers."""
    from everest_ds.data.video_list import read_class_names

    count = model.config.model.num_classes or 0
    names = read_class_names(file) if file else model.class_names or [f"class {i}" for i in range(count)]
    if len(names) != count:
        raise UsageError(
            f"{file}: the number of class names is not the model's number of classes",
            given=f"{len(names)} names",
            allowed=count,
        )
    return list(names)
