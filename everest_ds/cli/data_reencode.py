"""`everest-ds data reencode`: the same videos, written so that clips decode fast."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from everest_ds.cli.output import JsonFile, print_facts, print_table, progress_of, write_json
from everest_ds.errors import ExitCode

_MEASURED = 20  # files that the gain is measured on


def reencode(
    manifest: Annotated[Path, typer.Argument(help="A list of `path label` lines.")],
    out: Annotated[Path, typer.Option(help="Where to write the videos and their manifest.")],
    root: Annotated[Path | None, typer.Option(help="Folder of relative paths.")] = None,
    short_side: Annotated[int, typer.Option(min=32, help="Of the pictures, pixels; none grows.")] = 256,
    gop: Annotated[int, typer.Option(min=1, help="Frames from key frame to key frame.")] = 8,
    crf: Annotated[int, typer.Option(min=0, max=51, help="x264's quality; lower is better, larger.")] = 20,
    preset: Annotated[str, typer.Option(help="x264's effort, ultrafast to veryslow.")] = "medium",
    stride: Annotated[int, typer.Option(min=1, help="Of the clips that the gain is measured on.")] = 4,
    frames: Annotated[int, typer.Option(min=1, help="Of the clips that the gain is measured on.")] = 16,
    workers: Annotated[int, typer.Option(min=1, help="Processes to use.")] = os.cpu_count() or 1,
    json_file: JsonFile = None,
) -> None:
    """Shrink videos, put key frames close together, verify every file, measure the gain; exit 3 if any fails.

    Frames keep their numbers and labels; sound is left out. Stopped, the same command goes on.

    Example: everest-ds data reencode k400/train.txt --out k400_256
    """
    from everest_ds.config import DataConfig
    from everest_ds.data import reencode as work
    from everest_ds.data.ledger import Ledger
    from everest_ds.data.manifest import read_manifest, write_manifest

    samples = read_manifest(manifest, root=root, num_classes=None, labelled=False)
    jobs = work.plan_jobs(samples, root or manifest.parent, out)
    out.mkdir(parents=True, exist_ok=True)
    target = out / manifest.name
    encoding = work.Encoding(short_side, gop, crf, preset)
    with progress_of("writing videos", len(jobs)) as on_progress:
        result = work.reencode(
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
            "measured_on": f"{gain.clips} clips of {frames} frames at stride {stride}, medians, interleaved",
        }
    print_facts("Re-encoded", facts)
    write_json(json_file, {**facts, "problems": [[s.name, reason] for s, reason in result.failed]})
    if result.failed:
        raise typer.Exit(ExitCode.DATA)
