"""`everest-ds data`: make, index and check data sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everest_ds.cli.data_index import index
from everest_ds.cli.data_reencode import reencode
from everest_ds.cli.output import JsonFile, print_table, progress_of, write_json
from everest_ds.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from everest_ds.config import DataConfig

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
    kind: Annotated[
        str, typer.Option(help="plain; busy: camera, noise and other objects move too; pauses: mostly still.")
    ] = "plain",
    workers: Workers = CORES,
    json_file: JsonFile = None,
) -> None:
    """Write a labelled motion data set of real H.264 files; the label is the motion of an object.

    Example: everest-ds data synth data/busy --kind busy --train 600
    """
    from everest_ds.data.synthetic import KINDS, MOTIONS, SyntheticSpec, synthesize

    if kind not in KINDS:
        raise UsageError("--kind", given=kind, allowed=", ".join(KINDS))
    counts = {"train": train, "val": val, "test": test}
    with progress_of("writing videos", sum(counts.values())) as on_progress:
        manifests = synthesize(folder, counts, SyntheticSpec(frames, size, seed, kind), workers, on_progress)
    rows = [
        {"split": split, "videos": count, "classes": len(MOTIONS), "manifest": str(manifest)}
        for (split, count), manifest in zip(counts.items(), manifests, strict=True)
    ]
    print_table("Synthetic motion data set", rows)
    write_json(json_file, rows)


app.command()(index)
app.command()(reencode)


@app.command()
def check(
    manifest: Annotated[Path, typer.Argument(help="A list of `path label` lines.")],
    root: Annotated[Path | None, typer.Option(help="Folder of relative paths.")] = None,
    min_frames: Annotated[int, typer.Option(min=1, help="Shortest video that is long enough.")] = 1,
    every_frame: Annotated[
        bool, typer.Option("--every-frame", help="Decode every frame of every one.")
    ] = False,
    decoder: Annotated[str, typer.Option(help="As data.decoder: decord, pyav or torchcodec.")] = "decord",
    timeout: Annotated[float, typer.Option(min=0.1, help="A video that takes longer is broken, s.")] = 120.0,
    workers: Workers = CORES,
    json_file: JsonFile = None,
) -> None:
    """Open every video of a manifest, decode both ends, and list what is broken; exit 3 if any is.

    What is found out is kept in the ledger beside the manifest (MANIFEST.ledger.jsonl): a check that was
    stopped goes on, files that have not changed are not looked at again, and training leaves out by name
    what is broken.
    """
    from everest_ds.data.check import check_manifest
    from everest_ds.data.ledger import Ledger
    from everest_ds.data.manifest import read_manifest

    samples = read_manifest(manifest, root=root, num_classes=None, labelled=False)
    ledger = Ledger.of_manifest(manifest)
    with progress_of("checking videos", len(samples)) as on_progress:
        checked = check_manifest(
            samples,
            ledger,
            data_config(decoder),
            min_frames=min_frames,
            workers=workers,
            on_progress=on_progress,
            every_frame=every_frame,
            timeout_s=timeout,
        )
    rows = [{"video": problem.sample.name, "problem": problem.reason} for problem in checked.problems]
    known = f", {checked.num_known} of them known from {ledger.path}" if checked.num_known else ""
    if rows:
        print_table(f"{len(rows)} of {len(samples)} videos are broken{known}", rows)
    else:
        typer.echo(f"{manifest}: all {len(samples)} videos are readable{known}")
    facts = {"checked": len(samples), "known": checked.num_known, "ledger": str(ledger.path)}
    write_json(json_file, {**facts, "problems": rows})
    if rows:
        raise typer.Exit(ExitCode.DATA)


def data_config(decoder: str) -> DataConfig:
    """The `data` section that reads videos so.

    Raises:
        ConfigError: there is no such decoder here.
    """
    from everest_ds.config import DataConfig
    from everest_ds.config.schema import DECODERS
    from everest_ds.data.decode import require_decoder

    if decoder not in DECODERS:
        raise UsageError("--decoder", given=decoder, allowed=", ".join(DECODERS))
    require_decoder(decoder)
    return DataConfig.model_validate({"decoder": decoder})
