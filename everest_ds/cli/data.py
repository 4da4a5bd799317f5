"""`everest-ds data`: make, index and check data sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from everest_ds.cli.output import JsonFile, print_table, write_json
from everest_ds.errors import ExitCode

app = typer.Typer(help="Make, index and check data sets of videos.", no_args_is_help=True)
Workers = Annotated[int, typer.Option(min=1, help="Processes to use.")]
CORES = os.cpu_count() or 1


@app.command()
def synth(
    folder: Annotated[Path, typer.Argument(help="Where to write videos, manifests and class names.")],
    train: Annotated[int, typer.Option(min=1, help="Training videos.")] = 2700,
    val: Annotated[int, typer.Option(min=1, help="Validation videos.")] = 120,
    test: Annotated[int, typer.Option(min=1, help="Test videos.")] = 300,
    frames: Annotated[int, typer.Option(min=2, help="Frames of a video.")] = 18,
    size: Annotated[int, typer.Option(min=32, help="Height and width, pixels.")] = 32,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal videos.")] = 0,
    workers: Workers = CORES,
    json_file: JsonFile = None,
) -> None:
    """Write a labelled motion data set of real H.264 files; the label is the motion of an object."""
    from rich.progress import Progress

    from everest_ds.data.synthetic import MOTIONS, SyntheticSpec, synthesize

    counts = {"train": train, "val": val, "test": test}
    with Progress(transient=True) as progress:
        task = progress.add_task("writing videos", total=sum(counts.values()))
        manifests = synthesize(
            folder,
            counts,
            SyntheticSpec(frames, size, seed),
            workers,
            lambda done: progress.update(task, completed=done),
        )
    rows = [
        {"split": split, "videos": count, "classes": len(MOTIONS), "manifest": str(manifest)}
        for (split, count), manifest in zip(counts.items(), manifests, strict=True)
    ]
    print_table("Synthetic motion data set", rows)
    write_json(json_file, rows)


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="A folder with one sub-folder of videos per class.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the manifests.")] = None,
    val: Annotated[float, typer.Option(min=0, max=1, help="Share for validation.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share for test.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal splits.")] = 0,
    json_file: JsonFile = None,
) -> None:
    """Write train, val and test manifests and class names for a folder of videos."""
    from everest_ds.data.manifest import index_folder, split_samples, write_manifest

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


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(help="A list of `path label` lines.")],
    root: Annotated[Path | None, typer.Option(help="Folder of relative paths.")] = None,
    min_frames: Annotated[int, typer.Option(min=1, help="Shortest video that is long enough.")] = 1,
    workers: Workers = CORES,
    json_file: JsonFile = None,
) -> None:
    """Open every video of a manifest, decode both ends, and list what is broken; exit 3 if any is."""
    from rich.progress import Progress

    from everest_ds.data.check import check_manifest
    from everest_ds.data.manifest import read_manifest

    samples = read_manifest(manifest, root=root, num_classes=None, labelled=False)
    with Progress(transient=True) as progress:
        task = progress.add_task("checking videos", total=len(samples))
        problems = check_manifest(
            samples,
            min_frames=min_frames,
            workers=workers,
            on_progress=lambda done: progress.update(task, completed=done),
        )
    rows = [{"video": str(p.path), "problem": p.reason} for p in problems]
    if rows:
        print_table(f"{len(rows)} of {len(samples)} videos are broken", rows)
    else:
        typer.echo(f"{manifest}: all {len(samples)} videos are readable")
    write_json(json_file, {"checked": len(samples), "problems": rows})
    if rows:
        raise typer.Exit(ExitCode.DATA)
