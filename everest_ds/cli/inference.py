"""`everest-ds features | predict`: a trained model at work on videos."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everest_ds.cli.output import JsonFile, print_facts, print_table, progress_of, write_json
from everest_ds.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from everest_ds.inference.views import Views

Model = Annotated[
    Path,
    typer.Option(
        "--model",
        help="A run, a checkpoint or .safetensors file, a .pth of VideoMAE, EVEREST, MVD or MME, or a folder"
        " of transformers' VideoMAE.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY.PATH=VALUE]...",
        help="Settings to change: data.frame_stride=2, or tokens.selection=rero tokens.keep_ratio=0.6.",
    ),
]
Segments = Annotated[int, typer.Option(min=1, help="Places in time to look at, averaged.")]
Crops = Annotated[int, typer.Option(min=1, help="Places in space to look at, averaged.")]


def features(
    videos: Annotated[Path, typer.Argument(help="A folder of videos, however nested, or a manifest.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="Table to write: .npz, or .parquet (needs pyarrow).")],
    overrides: Overrides = None,
    segments: Segments = 1,
    crops: Crops = 1,
    workers: Annotated[int, typer.Option(min=0, help="Decoding processes.")] = min(8, os.cpu_count() or 1),
    json_file: JsonFile = None,
) -> None:
    """Write one vector a video: the encoder's mean over the tokens that it keeps.

    Columns: video, label (of a manifest; -1 without), features. Stopped, the same command goes on. Videos
    that cannot be read are listed, kept in OUT.ledger.jsonl, and left out; exit 3 if there are any.

    Example: everest-ds features my_videos --model runs/pre --out features.npz
    """
    from everest_ds.data.manifest import list_samples
    from everest_ds.inference.features import extract
    from everest_ds.inference.table import check_name

    check_name(out)
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
        "features": "none" if done.table is None else f"{done.table.features.shape[1]} a video, float32",
        "tokens": _tokens(network.config),
    }
    print_facts(f"{out}", facts)
    rows = [{"video": problem.sample.name, "problem": problem.reason} for problem in done.problems]
    write_json(json_file, {**facts, "problems": rows})
    if rows:
        print_table(f"{len(rows)} of {len(samples)} videos cannot be read", rows)
        raise typer.Exit(ExitCode.DATA)


def predict(
    video: Annotated[Path, typer.Argument(help="A video.")],
    model: Model,
    overrides: Overrides = None,
    segments: Segments = 1,
    crops: Crops = 1,
    classes: Annotated[Path | None, typer.Option(help="Class names, one a line, in label order.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Where to draw the kept tokens. Default: VIDEO.kept.png, here.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Name the five likeliest classes of a video, and draw the tokens that the model looked at.

    Example: everest-ds predict clip.mp4 --model runs/fine
    """
    from everest_ds.inference import predict as inference
    from everest_ds.reports.kept_tokens import draw_kept

    network = _load(model, ["data.num_workers=0", *(overrides or [])])
    names = _class_names(network, classes)
    with progress_of("looking", segments * crops) as on_progress:
        probabilities = inference.predict(network, video, _views(segments, crops), on_progress)
    best = probabilities.argsort()[::-1][:5]
    rows = [{"class": names[label], "probability_pct": 100 * float(probabilities[label])} for label in best]
    print_table(f"{video}", rows)
    sight = inference.see(network, video)
    target = picture or Path(f"{video.stem}.kept.png")
    _draw(target, draw_kept(*sight))
    typer.echo(f"{target}: {sight.kept_Thw.mean():.0%} of the tokens ({_tokens(network.config)})")
    write_json(json_file, {"video": str(video), "top": rows, "picture": str(target)})


def _load(model: Path, overrides: list[str], features: bool = False) -> Any:
    from everest_ds.inference.views import best_device
    from everest_ds.interchange.load import load_model

    return load_model(model, *overrides, features=features).to(best_device())


def _views(segments: int, crops: int) -> Views:
    from everest_ds.inference.views import Views

    return Views(segments, crops)


def _tokens(config: Any) -> str:
    return f"{config.tokens.selection}, {config.token_counts.num_kept} of {config.token_counts.num_tokens}"


def _class_names(model: Any, file: Path | None) -> list[str]:
    """From the file, the model's own, those of its run, or numbers."""
    from everest_ds.data.manifest import read_class_names

    count = model.config.model.num_classes or 0
    file = file or (None if model.class_names else model.config.data.class_names)
    names = read_class_names(file) if file else model.class_names or [f"class {i}" for i in range(count)]
    if len(names) != count:
        raise UsageError(f"{file}: not the model's classes", given=f"{len(names)} names", allowed=count)
    return list(names)


def _draw(file: Path, image: Any) -> None:
    from matplotlib.image import imsave  # heavy

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        imsave(file, image)
    except OSError as error:
        raise UsageError(f"{file}: cannot write the picture", given=error.strerror) from None
