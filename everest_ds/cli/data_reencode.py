"""The command `everest-ds data reencode`, which rewrites videos so that clips decode faster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.console import (
    print_facts,
    print_table,
    progress_of,
    write_json,
)
from everest_ds.errors import ExitCode

_MEASURED = 20  # number of videos used to measure the speedup


def reencode(
    manifest: Annotated[Path, typer.Argument(help="Text file with one `path label` line per video.")],
    out: Annotated[Path, typer.Option(help="Folder to write the videos and their manifest to.")],
    root: Annotated[
        Path | None,
        typer.Option(help="Folder that relative paths start from; default: the folder of the manifest."),
    ] = None,
    short_side: Annotated[
        int,
        typer.Option(min=32, help="Length of the shorter side, in pixels; smaller videos are not enlarged."),
    ] = 256,
    gop: Annotated[
        int, typer.Option(min=1, help="Distance between key frames, in frames; shorter decodes faster.")
    ] = 8,
    crf: Annotated[
        int,
        typer.Option(min=0, max=51, help="Quality setting of x264; lower means better and larger videos."),
    ] = 20,
    preset: Annotated[str, typer.Option(help="Speed preset of x264, from ultrafast to veryslow.")] = "medium",
    stride: Annotated[
        int, typer.Option(min=1, help="Frame stride of the clips used to measure the speedup.")
    ] = 4,
    frames: Annotated[
        int, typer.Option(min=1, help="Number of frames in the clips used to measure the speedup.")
    ] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Number of worker processes.")] = os.cpu_count() or 1,
    json_file: JsonFile = None,
) -> None:
    """Re-encode videos to a smaller size with frequent key frames, so that clips decode faster.

    Every new file is verified, and the speedup is measured; the exit code is 3 if a video fails. Frame
    numbers and labels stay the same, and sound is removed. Repeat the command to resume an interrupted run.

    Example: everest-ds data reencode k400/train.txt --out k400_256
    """
    from everest_ds.config import DataConfig
    from everest_ds.data.ledger import Ledger
    from everest_ds.data.maintenance import reencode as work
    from everest_ds.data.video_list import read_manifest, write_manifest

    samples = read_manifest(manifest, root=root, num_classes=None, labelled=False)
    jobs = work.plan_jobs(samples, root or manifest.parent, out)
    out.mkdir(parents=True, exist_ok=True)
    target = out / manifest.name
    encoding = work.Encoding(short_side, gop, crf, preset)
    with progress_of("writing videos", len(jobs)) as on_progress:
        result = work.reencode_videos(
            jobs, Ledger.of_manifest(target), encoding, workers=workers, on_progress=on_progress
        )
    write_manifest(target, result.samples, out)
    if result.failed:
        rows = [{"video": sample.name, "problem": reason} for sample, reason in result.failed]
        print_table(f"{len(rows)} of {len(jobs)} videos were not written", rows)
    made = {sample.path: sample for sample in result.samples}
    pairs = [(job.sample, made[job.target]) for job in jobs if job.target in made][
        :: max(1, len(made) // _MEASURED)
    ]
    gain = work.measure_gain(pairs[:_MEASURED], DataConfig(frame_stride=stride), frames)
    facts: dict[str, Any] = {
        "manifest": str(target),
        "videos": len(result.samples),
        "there_already": result.num_known,
        "failed": len(result.failed),
    }
    if gain is not None:
        facts |= {
            "decode_before_ms": gain.before_ms,
            "decode_after_ms": gain.after_ms,
            "speedup": gain.before_ms / gain.after_ms,
            "size_after_pct": 100 * gain.after_bytes / gain.before_bytes,
            "measured_on": f"{gain.clips} clips of {frames} frames at stride {stride}; medians of"
            " interleaved runs",
        }
    print_facts("Re-encoded videos", facts)
    write_json(json_file, {**facts, "problems": [[s.name, reason] for s, reason in result.failed]})
    if result.failed:
        raise typer.Exit(ExitCode.DATA)
