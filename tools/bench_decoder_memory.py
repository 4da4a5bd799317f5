"""Measure, for each decoder, whether resident memory grows in a process that opens and reads many videos.

Example:
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
from everest_ds.data.decoding.open_video import open_video, require_decoder
from everest_ds.data.video_files import VIDEO_SUFFIXES
from everest_ds.errors import ConfigError
from everest_ds.host_memory import resident_bytes

MIB = 2**20
FRAMES = 16
POINTS = 200  # number of points per curve
WARM_UP_PCT = 5  # share of the opens during which caches and arenas still fill


def watch(decoder: str, folder: Path, opens: int, short_side: int | None) -> list[tuple[int, float]]:
    """Open and read videos `opens` times, and return pairs (opens so far, resident MiB)."""
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
    """Summarise how far memory deviates from its median after the warm-up."""
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
    """Plot memory over the number of opens, one line per decoder."""
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
    """Measure the decoders named on the command line, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("--opens", type=int, default=10_000, help="number of files to open, per decoder")
    parser.add_argument("--decoder", action="append", choices=DECODERS, help="may be repeated; default: all")
    parser.add_argument("--short-side", type=int, help="shrink pictures to this short side, in pixels")
    parser.add_argument("--plot", type=Path, help="write the curves to this picture")
    parser.add_argument("--json", type=Path, help="write the results to this file as JSON")
    options = parser.parse_args()
    curves = {}
    for decoder in options.decoder or DECODERS:
        try:
            require_decoder(decoder)
        except ConfigError as error:
            print(error)
            continue
        job = partial(watch, decoder, options.videos, options.opens, options.short_side)
        with multiprocessing.get_context("spawn").Pool(1) as pool:  # a fresh process per decoder
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
