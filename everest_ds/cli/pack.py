"""The command `everest-ds data pack`, which puts the frames of a data set into a frame store.

The function that does the work imports the decoders, because those import torch.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from everest_ds.cli.options import NUM_CORES, JsonFile, ManifestArg, ManifestRoot, ShortSide, Workers
from everest_ds.config import DataConfig
from everest_ds.console import print_facts, print_problems, progress_of, write_json
from everest_ds.data.data_set import read_data_set
from everest_ds.data.store.layout import Packing
from everest_ds.data.video_list import Sample
from everest_ds.errors import ExitCode
from everest_ds.units import format_bytes

_NUM_FRAMES, _READING = 16, DataConfig(frame_stride=4)  # the clips by which the gain is measured
_CLIPS = f"{_NUM_FRAMES} frames at stride {_READING.frame_stride}"


def pack(
    manifest: ManifestArg,
    out: Annotated[Path, typer.Option(help="Folder to write the frame store to.")],
    root: ManifestRoot = None,
    short_side: ShortSide = 256,
    quality: Annotated[
        int, typer.Option(min=1, max=100, help="JPEG quality; lower means smaller and worse pictures.")
    ] = 85,
    every: Annotated[
        int,
        typer.Option(
            min=1,
            help="Keep every Nth frame, for a smaller store; data.frame_stride must then be a multiple of N.",
        ),
    ] = 1,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Pack a few videos into a temporary folder, and print the prediction."
        ),
    ] = False,
    workers: Workers = NUM_CORES,
    json_file: JsonFile = None,
) -> None:
    """Put the frames of a data set into a frame store, from which clips decode many times faster.

    A store is a folder of JPEG pictures in tar files. Every command takes it in place of the manifest, as in
    data.train=STORE. Frame numbers and labels stay the same. Every video is verified; the exit code is 3 if
    one fails. Repeat the command to resume an interrupted run, or to add new videos of the manifest.

    Example: everest-ds data pack k400/train.txt --out k400/train.store
    """
    samples = read_data_set(manifest, root=root, num_classes=None, labelled=False)
    base = manifest if manifest.is_dir() else root or manifest.parent
    packing = Packing(short_side, quality, every)
    if dry_run:
        from everest_ds.data.store.pack import StorePacker

        with tempfile.TemporaryDirectory() as folder:
            packer = StorePacker(samples, base, Path(folder), packing, workers)
            plan = _plan(packer, len(samples), workers, out)
        write_json(json_file, {**asdict(packing), **plan})
        return
    facts = _pack(samples, base, out, packing, workers)
    write_json(json_file, facts)
    if facts["problems"]:
        raise typer.Exit(ExitCode.DATA)


def _pack(samples: Sequence[Sample], base: Path, out: Path, packing: Packing, workers: int) -> dict[str, Any]:
    """Pack the samples into `out`; print and return the result."""
    from everest_ds.data.maintenance.gain import measure_gain
    from everest_ds.data.store.pack import StorePacker
    from everest_ds.data.store.shards import packing_into

    inputs = {sample.file for sample in samples[:: max(1, len(samples) // 100)]}
    with packing_into(out, inputs):
        packer = StorePacker(samples, base, out, packing, workers)
        if packer.num_left:
            _plan(packer, packer.num_left, workers, out)
            with progress_of("packing videos", len(samples)) as on_progress:
                packer.pack_all(on_progress)
        facts = packer.finish()
    failed = [(str(base / name), reason) for name, reason in packer.failed.items()]
    if failed:
        print_problems(f"{len(failed)} of {len(samples)} videos were not packed", failed, base)
    facts |= {"there_already": packer.num_known, "failed": len(failed)}
    gain = measure_gain(packer.pairs(), _READING, _NUM_FRAMES)
    facts |= {} if gain is None else gain.rates(_CLIPS)
    shown = {name: format_bytes(facts[name]) for name in ("bytes", "source_bytes")}
    print_facts(f"Frame store {out}", {k: v for k, v in (facts | shown).items() if k != "packing"})
    typer.echo(f"Train on it with data.train={shlex.quote(str(out))}")
    return facts | {"problems": failed}


def _plan(packer: Any, num_left: int, workers: int, out: Path) -> dict[str, Any]:
    """Pack a few samples, then print and return the prediction for so many further ones.

    Raises:
        DataError: if the disk of `out` has too little room for them.
    """
    from everest_ds.data.maintenance.gain import measure_gain

    with progress_of("packing a few videos, to predict the rest", packer.num_left) as on_progress:
        packer.pack_some(on_progress)
    estimate = packer.estimate(num_left)
    gain = measure_gain(packer.pairs(), _READING, _NUM_FRAMES)
    plan = {"videos_left": num_left, "bytes": round(estimate.num_bytes), "minutes": estimate.minutes}
    plan |= {"workers": workers, "spread_pct": round(estimate.spread_pct)}
    plan |= {} if gain is None else gain.rates(_CLIPS)
    print_facts("Predicted", plan | {"bytes": format_bytes(estimate.num_bytes)})
    packer.check_room(out, num_left)
    return plan
