"""The command `everest-ds data`, which creates, indexes, checks and re-encodes data sets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.console import print_table, progress_of, write_json
from everest_ds.errors import ExitCode, UsageError

if TYPE_CHECKING:
    from everest_ds.config import DataConfig

Workers = Annotated[int, typer.Option(min=1, help="Number of worker processes.")]
CORES = os.cpu_count() or 1


def synth(
    folder: Annotated[Path, typer.Argument(help="Folder to write the videos, manifests and class names to.")],
    train: Annotated[int, typer.Option(min=1, help="Number of training videos.")] = 2700,
    val: Annotated[int, typer.Option(min=1, help="Number of validation videos.")] = 120,
    test: Annotated[int, typer.Option(min=1, help="Number of test videos.")] = 300,
    frames: Annotated[int, typer.Option(min=2, help="Number of frames in each video.")] = 18,
    size: Annotated[int, typer.Option(min=32, help="Height and width of the frames, in pixels.")] = 32,
    seed: Annotated[int, typer.Option(help="Random seed; the same seed gives the same videos.")] = 0,
    kind: Annotated[
        str,
        typer.Option(
            help="Kind of video. plain: one object moves; busy: with camera motion, noise and other moving"
            " objects; pauses: the object stands still most of the time."
        ),
    ] = "plain",
    workers: Workers = CORES,
    json_file: JsonFile = None,
) -> None:
    """Create a small labelled data set of H.264 videos, in which the label is the motion of an object.

    Example: everest-ds data synth data/busy --kind busy --train 600
    """
    from everest_ds.data.synthetic import KINDS, MOTIONS, SyntheticSpec, synthesize

    if kind not in KINDS:
        raise UsageError("--kind is not a known kind of video", given=kind, allowed=", ".join(KINDS))
    counts = {"train": train, "val": val, "test": test}
    with progress_of("writing videos", sum(counts.values())) as on_progress:
        manifests = synthesize(folder, counts, SyntheticSpec(frames, size, seed, kind), workers, on_progress)
    rows = [
        {"split": split, "videos": count, "classes": len(MOTIONS), "manifest": str(manifest)}
        for (split, count), manifest in zip(counts.items(), manifests, strict=True)
    ]
    print_table("Synthetic motion data set", rows)
    write_json(json_file, rows)


def check(
    manifest: Annotated[Path, typer.Argument(help="Text file with one `path label` line per video.")],
    root: Annotated[
        Path | None,
        typer.Option(help="Folder that relative paths start from; default: the folder of the manifest."),
    ] = None,
    min_frames: Annotated[
        int, typer.Option(min=1, help="Number of frames below which a video counts as broken.")
    ] = 1,
    every_frame: Annotated[
        bool, typer.Option("--every-frame", help="Decode all frames of each video, not only its two ends.")
    ] = False,
    decoder: Annotated[
        str, typer.Option(help="Decoder, as in data.decoder: decord, pyav or torchcodec.")
    ] = "decord",
    timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds after which an unfinished video counts as broken.")
    ] = 120.0,
    workers: Workers = CORES,
    json_file: JsonFile = None,
) -> None:
    """Open every video of a manifest, decode its first and last frames, and list the broken videos.

    The exit code is 3 if any video is broken. The results are kept in a ledger beside the manifest
    (MANIFEST.ledger.jsonl). Repeating the command resumes an interrupted check and skips files that have not
    changed; training excludes the videos that the ledger lists as broken.
    """
    from everest_ds.data.ledger import Ledger
    from everest_ds.data.maintenance.check import check_manifest
    from everest_ds.data.video_list import read_manifest

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
    known = f" ({checked.num_known} results are from {ledger.path})" if checked.num_known else ""
    if rows:
        print_table(f"{len(rows)} of {len(samples)} videos are broken{known}", rows)
    else:
        typer.echo(f"{manifest}: all {len(samples)} videos can be read{known}")
    facts = {"checked": len(samples), "known": checked.num_known, "ledger": str(ledger.path)}
    write_json(json_file, {**facts, "problems": rows})
    if rows:
        raise typer.Exit(ExitCode.DATA)


def data_config(decoder: str) -> DataConfig:
    """Return a `data` section that reads videos with the given decoder.

    Raises:
        UsageError: if the decoder is unknown.
        ConfigError: if the decoder is not installed.
    """
    from everest_ds.config import DataConfig
    from everest_ds.config.schema import DECODERS
    from everest_ds.data.decoding.open_video import require_decoder

    if decoder not in DECODERS:
        raise UsageError("--decoder is not a known decoder", given=decoder, allowed=", ".join(DECODERS))
    require_decoder(decoder)
    return DataConfig.model_validate({"decoder": decoder})
