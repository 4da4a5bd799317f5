"""Resident memory of a process that opens and reads videos over and over, by decoder: does it grow?

python tools/bench_decoder_memory.py FOLDER_OF_VIDEOS --opens 10000 --plot decoder_memory.png
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from everest_ds.config.schema import DECODERS
from everest_ds.data.decode import open_video, require_decoder
from everest_ds.data.manifest import VIDEO_SUFFIXES
from everest_ds.errors import ConfigError
from everest_ds.resident import resident_bytes

MIB = 2**20
FRAMES = 16
POINTS = 200  # of a curve
WARM_UP_PCT = 5  # of the opens: caches and arenas fill


def watch(decoder: str, folder: Path, opens: int, short_side: int | None) -> list[tuple[int, float]]:
    """Open and read `opens` times; pairs (opens so far, resident MiB)."""
    videos = sorted(path for path in folder.iterdir() if path.suffix in VIDEO_SUFFIXES)
    rng = np.random.default_rng(0)
    curve = []
    for number in range(1, opens + 1):
        with open_video(videos[number % len(videos)], decoder, short_side) as video:
            video.read(sorted(rng.integers(video.num_frames, size=FRAMES).tolist()))
        if number % max(1, opens // POINTS) == 0:
            curve.append((number, resident_bytes() / MIB))
    return curve


def summarize(decoder: str, curve: list[tuple[int, float]]) -> dict[str, Any]:
    """How far memory strays from its median once it is warm."""
    warm = [mib for number, mib in curve if number > curve[-1][0] * WARM_UP_PCT / 100]
    middle = statistics.median(warm)
    tenth = max(1, len(warm) // 10)
    return {
        "decoder": decoder,
        "opens": curve[-1][0],
        "median_mib": middle,
        "lowest_pct": 100 * (min(warm) / middle - 1),
        "highest_pct": 100 * (max(warm) / middle - 1),
        "last_tenth_against_first_pct": 100
        * (statistics.median(warm[-tenth:]) / statistics.median(warm[:tenth]) - 1),
    }


def plot(curves: dict[str, list[tuple[int, float]]], file: Path) -> None:
    """Memory over opens, a line a decoder."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    for decoder, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=decoder)
    axes.set(xlabel="files opened and read", ylabel="resident memory, MiB", ylim=(0, None))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Read the command line, do it, print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("videos", type=Path)
    parser.add_argument("--opens", type=int, default=10_000)
    parser.add_argument("--decoder", action="append", choices=DECODERS, help="default: all")
    parser.add_argument("--short-side", type=int, help="shrink while decoding, pixels")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    curves = {}
    for decoder in options.decoder or DECODERS:
        try:
            require_decoder(decoder)
        except ConfigError as error:
            print(error)
            continue
        job = partial(watch, decoder, options.videos, options.opens, options.short_side)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # each from a fresh process
            curves[decoder] = pool.apply(job)
    rows = [summarize(decoder, curve) for decoder, curve in curves.items()]
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        cells = (f"{value:.1f}" if isinstance(value, float) else str(value) for value in row.values())
        print("| " + " | ".join(cells) + " |")
    if options.plot:
        plot(curves, options.plot)
    if options.json:
        options.json.write_text(json.dumps({"summary": rows, "curves": curves}))


if __name__ == "__main__":
    main()
