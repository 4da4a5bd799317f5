"""The command `everest-ds data index`, which writes manifests from class folders or annotation files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.console import print_table, write_json
from everest_ds.errors import UsageError


def index(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder with one sub-folder of videos per class, or the name of a known data set: k400,"
            " ssv2, ucf101, hmdb51 or oscc (needs --annotations and --videos)."
        ),
    ],
    annotations: Annotated[
        Path | None, typer.Option(help="Known data set: folder of the official annotation files.")
    ] = None,
    videos: Annotated[
        Path | None, typer.Option(help="Known data set: folder of the videos, searched recursively.")
    ] = None,
    fold: Annotated[
        int,
        typer.Option(min=1, help="Known data set: number of the official split (UCF101, HMDB51: 1 to 3)."),
    ] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write to; default: the path given as source.")
    ] = None,
    val: Annotated[
        float, typer.Option(min=0, max=1, help="Class folders: fraction of the videos for validation.")
    ] = 0.1,
    test: Annotated[
        float, typer.Option(min=0, max=1, help="Class folders: fraction of the videos for the test.")
    ] = 0.1,
    seed: Annotated[
        int, typer.Option(help="Class folders: random seed; the same seed gives the same split.")
    ] = 0,
    json_file: JsonFile = None,
) -> None:
    """Write the manifests (lists of videos and labels) and class names that training needs.

    For a known data set, also write its configs and the list of missing videos.

    Example: everest-ds data index ucf101 --annotations ucfTrainTestlist --videos UCF-101 --out ucf101
    """
    if annotations is None and videos is None:
        _index_folder(source, out, val, test, seed, json_file)
    elif annotations is None or videos is None:
        raise UsageError(
            "only one of --annotations and --videos was given", fix="give both for a known data set"
        )
    else:
        _index_official(source, annotations, videos, fold, out or Path(source), json_file)


def _index_official(
    name: str, annotations: Path, videos: Path, fold: int, out: Path, json_file: JsonFile
) -> None:
    from everest_ds.data.official import find_dataset, index_dataset
    from everest_ds.data.official.write import MISSING_FILE, write_index

    dataset = find_dataset(name)
    indexed = index_dataset(dataset, annotations, videos, fold)
    manifests = write_index(dataset, indexed, out)
    rows = [
        {
            "split": split,
            "videos": len(samples),
            "missing": len(indexed.missing[split]),
            "manifest": str(manifests.get(split, "-")),
        }
        for split, samples in indexed.splits.items()
    ]
    print_table(f"{dataset.title}: {len(indexed.classes)} classes, fold {fold}", rows)
    recipes = [_recipe(task, recipe) for task, recipe in dataset.recipes.items()]
    print_table(f"Recipes, used by {out}/pretrain.yaml and {out}/finetune.yaml", recipes)
    if any(row["missing"] for row in rows):
        typer.echo(f"warning: some videos are missing; {out / MISSING_FILE} lists them", err=True)
    if len(indexed.classes) != dataset.num_classes:
        typer.echo(
            f"warning: found {len(indexed.classes)} of the {dataset.num_classes} classes of {dataset.title}",
            err=True,
        )
    missing = {split: names for split, names in indexed.missing.items() if names}
    write_json(json_file, {"splits": rows, "missing": missing, "recipes": recipes})


def _recipe(task: str, name: str) -> dict[str, Any]:
    """Return the settings of a recipe that depend on the data set: sampling, flips and test views."""
    from everest_ds.config import load_experiment

    data = load_experiment(name).data
    views = f"{data.test_segments} x {data.test_crops}" if task == "finetune" else "-"
    return {
        "recipe": name,
        "sampling": "segments" if data.sampling == "segments" else f"stride {data.frame_stride}",
        "flip": "yes" if data.horizontal_flip else "no",
        "test_views": views,
    }


def _index_folder(
    source: str, out: Path | None, val: float, test: float, seed: int, json_file: JsonFile
) -> None:
    from everest_ds.data.official import DATASETS
    from everest_ds.data.video_list import index_folder, split_samples, write_manifest

    folder = Path(source)
    if source in DATASETS and not folder.is_dir():
        raise UsageError(
            f"--annotations and --videos are missing for the data set {source}",
            fix="give both; see everest-ds data index --help",
        )
    samples, classes = index_folder(folder)
    splits = split_samples(samples, (1 - val - test, val, test), seed)
    target = out or folder
    target.mkdir(parents=True, exist_ok=True)
    (target / "classes.txt").write_text("\n".join(classes) + "\n")
    rows = []
    for name, part in zip(("train", "val", "test"), splits, strict=True):
        write_manifest(target / f"{name}.txt", part, target)
        rows.append({"split": name, "videos": len(part), "manifest": str(target / f"{name}.txt")})
    print_table(f"{len(samples)} videos of {len(classes)} classes", rows)
    write_json(json_file, rows)
