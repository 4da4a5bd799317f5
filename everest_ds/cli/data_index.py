"""`everest-ds data index`: manifests from a folder per class, or from an official annotation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from everest_ds.cli.output import JsonFile, print_table, write_json
from everest_ds.errors import UsageError


def index(
    source: Annotated[
        str,
        typer.Argument(help="k400, ssv2, ucf101, hmdb51, oscc; or a folder with one sub-folder a class."),
    ],
    annotations: Annotated[Path | None, typer.Option(help="Folder of the official annotation files.")] = None,
    videos: Annotated[Path | None, typer.Option(help="Folder of the videos, however nested.")] = None,
    fold: Annotated[int, typer.Option(min=1, help="Which official division (UCF101, HMDB51: 1 to 3).")] = 1,
    out: Annotated[Path | None, typer.Option(help="Where to write; default: SOURCE.")] = None,
    val: Annotated[float, typer.Option(min=0, max=1, help="Of a folder: share for validation.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=1, help="Of a folder: share for test.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of a folder: equal seeds give equal splits.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Write manifests, class names and the list of missing files; for a known data set also its configs.

    Example: everest-ds data index ucf101 --annotations ucfTrainTestlist --videos UCF-101 --out ucf101
    """
    if annotations is None and videos is None:
        _index_folder(source, out, val, test, seed, json_file)
    elif annotations is None or videos is None:
        raise UsageError("an official data set needs both --annotations and --videos")
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
        typer.echo(f"missing files are listed in {out / MISSING_FILE}", err=True)
    if len(indexed.classes) != dataset.num_classes:
        typer.echo(
            f"warning: {len(indexed.classes)} classes; all of {dataset.title} has {dataset.num_classes}",
            err=True,
        )
    missing = {split: names for split, names in indexed.missing.items() if names}
    write_json(json_file, {"splits": rows, "missing": missing, "recipes": recipes})


def _recipe(task: str, name: str) -> dict[str, Any]:
    """What method.md calls the recipe of a data set."""
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
    from everest_ds.data.manifest import index_folder, split_samples, write_manifest
    from everest_ds.data.official import DATASETS

    folder = Path(source)
    if source in DATASETS and not folder.is_dir():
        raise UsageError(f"{source} needs --annotations and --videos", fix="see everest-ds data index --help")
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
