"""Compare the tokens that each ReRo score selects with those of the exact score, and their cost.

    python tools/compare_scores.py clip1.mp4 clip2.avi --picture scores.png --json scores.json

Without files, synthetic motion clips are made. The exact score is `embedding` with `l2`, in float32. The
picture shows the selections on the first clip.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from everest_ds.cli.program import run_program
from everest_ds.config import Experiment
from everest_ds.console import print_table
from everest_ds.costs.compute import predict_macs
from everest_ds.data.decoding.open_video import open_video
from everest_ds.data.frames import ClipFrames
from everest_ds.data.synthetic import MOTIONS, SyntheticSpec, synthesize
from everest_ds.data.transforms import crop_resize, view_box
from everest_ds.models import Classifier
from everest_ds.models.selection.selector import Selector
from everest_ds.models.tubelets import PixelMap, from_tubelets, to_tubelets
from everest_ds.reports.figure import new_figure, to_png
from everest_ds.training.weights import load_encoder

EXACT = {"score": "embedding", "distance": "l2"}
CHEAPER = [
    {"score": score, "distance": distance}
    for score in ("embedding", "sketch", "pixel")
    for distance in ("l2", "l1", "cosine")
    if (score, distance) not in (("embedding", "l2"), ("sketch", "l1"))
]
RANDOM = {"selection": "random"}
DRAWN = [EXACT, {"score": "sketch", "distance": "l2"}, {"score": "pixel", "distance": "l2"}, RANDOM]
_MISSED, _EXTRA = (230, 60, 60), (70, 110, 240)


def main(
    clips: Annotated[
        list[Path] | None, typer.Argument(help="Video files; default: synthetic motion clips.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="Backbone whose patch embedding is used.")] = "vit_base",
    image_size: Annotated[int, typer.Option(help="Height and width of a frame, pixels.")] = 224,
    patch_size: Annotated[int, typer.Option(help="Height and width of a patch, pixels.")] = 16,
    keep_ratio: Annotated[float, typer.Option(help="Kept share of the tokens.")] = 0.3,
    stride: Annotated[int, typer.Option(help="Stride in frames between the 16 frames of a clip.")] = 2,
    weights: Annotated[
        Path | None, typer.Option(help="Run folder or .safetensors; default: random weights.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds; the median counts.")] = 9,
    picture: Annotated[Path | None, typer.Option(help="Draw the selections on the first clip.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the rows to this file.")
    ] = None,
) -> None:
    """Print recall of the exact kept set, multiply-accumulates and time of every score and distance."""
    shape = {"backbone": backbone, "image_size": image_size, "patch_size": patch_size, "num_classes": 2}
    config = experiment(shape, keep_ratio, EXACT)
    torch.manual_seed(0)
    model = Classifier(config)
    if weights is not None:
        load_encoder(model, config, weights)
    embedding = PixelMap(*(t.detach() for t in model.encoder.embed()))
    batch = torch.stack([read(file, config, stride) for file in clips or draw_clips(image_size)])
    arms = [EXACT, RANDOM, *CHEAPER]
    configs = [experiment(shape, keep_ratio, arm) for arm in arms]
    rows = compare(batch, configs, embedding, rounds)
    print_table(f"{len(batch)} clips, {config.token_counts}", rows)
    if picture is not None:
        picture.write_bytes(draw(batch[:1], [configs[arms.index(arm)] for arm in DRAWN], embedding))
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


def experiment(shape: dict[str, Any], keep_ratio: float, arm: dict[str, str]) -> Experiment:
    """Return a fine-tuning config with the token selection of `arm`."""
    tokens = {"keep_ratio": keep_ratio, **arm}
    return Experiment.model_validate({"task": "finetune", "model": shape, "tokens": tokens})


def read(file: Path, config: Experiment, stride: int) -> Tensor:
    """Read the middle clip of a video, with a smaller stride if the video is short: uint8 (F, H, W, 3)."""
    count = config.model.num_frames
    with open_video(file) as video:
        fitting = max(1, min(stride, (video.num_frames - 1) // (count - 1)))
        middle = ClipFrames(count, fitting, "stride", hold_last_frame=False)
        clip = video.read(middle.for_view(video.num_frames, 0, 1))
    return crop_resize(clip, view_box(clip.shape[1], clip.shape[2], 0, 1), config.model.image_size)


def draw_clips(size: int) -> list[Path]:
    """Synthesise two videos of each motion and return their files."""
    folder = Path(tempfile.mkdtemp())
    count = 2 * len(MOTIONS)
    synthesize(folder, {"test": count}, SyntheticSpec(num_frames=32, size=size), workers=2)
    return sorted((folder / "test").glob("*.mp4"))


def compare(
    batch: Tensor, configs: list[Experiment], embedding: PixelMap, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each config; recall is measured against the selection of the first."""
    kept = [select(config, batch, embedding) for config in configs]
    times = timed(configs, batch, embedding, rounds)
    rows = []
    for config, keep, seconds in zip(configs, kept, times, strict=True):
        recalls = [len(exact & found) / len(exact) for exact, found in zip(kept[0], keep, strict=True)]
        rows.append(
            {
                "score": config.tokens.score if config.tokens.rule.scores else "random",
                "distance": config.tokens.distance if config.tokens.rule.scores else "-",
                "recall_pct": round(100 * statistics.fmean(recalls), 1),
                "worst_clip_pct": round(100 * min(recalls), 1),
                "mmacs_per_clip": round(predict_macs(config).score_macs / 1e6, 1),
                "ms_per_clip": round(1000 * seconds / len(batch), 2),
            }
        )
    return rows


def select(config: Experiment, batch: Tensor, embedding: PixelMap) -> list[set[int]]:
    """Return the kept tokens of each clip."""
    chosen = Selector(config)(batch, embedding, torch.arange(len(batch)))
    return [set(keep.tolist()) for keep in chosen.visible_BV]


def timed(configs: list[Experiment], batch: Tensor, embedding: PixelMap, rounds: int) -> list[float]:
    """Return the median seconds of each config's selection on the batch; configs take turns."""
    keys = torch.arange(len(batch))
    seconds: list[list[float]] = [[] for _ in configs]
    for _ in range(rounds):
        for config, taken in zip(configs, seconds, strict=True):
            started = time.perf_counter()
            Selector(config)(batch, embedding, keys)
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def draw(clip: Tensor, configs: list[Experiment], embedding: PixelMap) -> bytes:
    """Draw a PNG: a row per selection, a column per slot; discarded tokens dim, missed red, extra blue."""
    geometry = configs[0].model.geometry
    kept = [select(config, clip, embedding)[0] for config in configs]
    pixels = to_tubelets(clip, geometry).float()
    rows = []
    for found in kept:
        canvas = (
            pixels * torch.tensor([0.25 + 0.75 * (t in found) for t in range(geometry.num_tokens)])[:, None]
        )
        for tokens, colour in ((kept[0] - found, _MISSED), (found - kept[0], _EXTRA)):
            index = torch.tensor(sorted(tokens), dtype=torch.long)
            tint = torch.tensor(colour).repeat(geometry.tubelet_values // 3)
            canvas[:, index] = 0.5 * canvas[:, index] + 0.5 * tint
        frames = from_tubelets(canvas, geometry)[0, :: geometry.tubelet_size]
        rows.append(np.concatenate(list(frames.byte().numpy()), axis=1))
    figure, axes = new_figure(12, 1.6 * len(rows))
    axes.imshow(np.concatenate(rows))
    labels = [f"{c.tokens.score}" if c.tokens.rule.scores else "random" for c in configs]
    axes.set_yticks([(i + 0.5) * geometry.image_size for i in range(len(rows))], labels)
    axes.set_xticks([])
    return to_png(figure)


if __name__ == "__main__":
    run_program(main)
