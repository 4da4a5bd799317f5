"""Compare the tokens that every rule and score keeps on given clips: overlap, rebuilt motion and cost.

    python tools/compare_scores.py clip1.mp4 clip2.avi --pictures kept --json scores.json

Without files, synthetic motion clips are made. The overlap is the share of the tokens kept by the exact score
(`embedding` with `l2`, in float32) that a rule keeps too. The error is that of the clip rebuilt from the kept
tokens, over the pixels that move (study/rebuild.py); it needs no model.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from study.kept import kept_tokens
from study.rebuild import MOVING_LEVELS, moving_error
from torch import Tensor

from everest_ds.cli.program import run_program
from everest_ds.config import Experiment
from everest_ds.console import print_table
from everest_ds.costs.compute import predict_macs
from everest_ds.data.decoding.open_video import open_video
from everest_ds.data.decoding.video import NoMotionError, Size, Video
from everest_ds.data.frames import ClipFrames
from everest_ds.data.synthetic import MOTIONS, SyntheticSpec, synthesize
from everest_ds.data.transforms import crop_motion, crop_pictures, needed_by, view_box
from everest_ds.models import Classifier
from everest_ds.models.tubelets import PixelMap, from_tubelets, to_tubelets
from everest_ds.reports.figure import new_figure, to_png
from everest_ds.training.weights import load_encoder

EXACT = {"score": "embedding", "distance": "l2"}
ARMS = [
    EXACT,
    {"score": "embedding", "distance": "l1"},
    {"score": "embedding", "distance": "cosine"},
    {"score": "sketch", "distance": "l2"},
    {"score": "sketch", "distance": "cosine"},
    {"score": "pixel", "distance": "l2"},
    {"score": "pixel", "distance": "l1"},
    {"score": "pixel", "distance": "cosine"},
    {"score": "codec", "distance": "l2"},
    *({"selection": rule} for rule in ("rlt", "random", "tube", "uniform")),
]
_PICTURES = 3  # clips that are drawn
_DIM = 0.25  # brightness of discarded tokens
_SIDE = 56  # of a frame in a picture, pixels


class Clip(NamedTuple):
    """A clip and the movement of its tubelets, None if its stream holds no motion vectors."""

    pixels: Tensor
    moved: Tensor | None


def main(
    clips: Annotated[
        list[Path] | None, typer.Argument(help="Video files; default: synthetic motion clips.")
    ] = None,
    backbone: Annotated[str, typer.Option(help="Backbone whose patch embedding is used.")] = "vit_base",
    image_size: Annotated[int, typer.Option(help="Height and width of a frame, pixels.")] = 224,
    patch_size: Annotated[int, typer.Option(help="Height and width of a patch, pixels.")] = 16,
    keep_ratio: Annotated[float, typer.Option(help="Kept share of the tokens.")] = 0.3,
    stride: Annotated[int, typer.Option(help="Stride in frames between the 16 frames of a clip.")] = 2,
    views: Annotated[int, typer.Option(min=1, help="Clips of each file, evenly spread over it.")] = 1,
    weights: Annotated[
        Path | None, typer.Option(help="Run folder or .safetensors; default: random weights.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds; the median counts.")] = 9,
    pictures: Annotated[
        Path | None, typer.Option(help=f"Folder to draw the kept tokens of the first {_PICTURES} clips in.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the rows to this file.")
    ] = None,
) -> None:
    """Print overlap, error of the rebuilt motion, multiply-accumulates and time of every rule and score."""
    shape = {"backbone": backbone, "image_size": image_size, "patch_size": patch_size, "num_classes": 2}
    configs = [experiment(shape, keep_ratio, arm) for arm in ARMS]
    torch.manual_seed(0)
    model = Classifier(configs[0])
    if weights is not None:
        load_encoder(model, configs[0], weights)
    embedding = PixelMap(*(t.detach() for t in model.encoder.embed()))
    files = clips or draw_clips(image_size)
    batch = [read(file, configs[0], stride, view, views) for file in files for view in range(views)]
    rows = compare(batch, configs, embedding, rounds)
    print_table(f"{len(batch)} clips, {configs[0].token_counts}; moving: over {MOVING_LEVELS} levels", rows)
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for number, clip in enumerate(batch[:_PICTURES], start=1):
            (pictures / f"kept_{number}.png").write_bytes(draw(clip, configs, embedding))
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2) + "\n")


def experiment(shape: dict[str, Any], keep_ratio: float, arm: dict[str, str]) -> Experiment:
    """Return a fine-tuning config with the token selection of `arm`."""
    tokens = {"keep_ratio": keep_ratio, **arm}
    return Experiment.model_validate({"task": "finetune", "model": shape, "tokens": tokens})


def read(file: Path, config: Experiment, stride: int, view: int, views: int) -> Clip:
    """Read a clip of a video, with a smaller stride if the video is short: uint8 (F, H, W, 3)."""
    try:
        with open_video(file, with_motion=True) as video:
            return _clip(video, config, stride, view, views)
    except NoMotionError:
        with open_video(file) as video:
            return _clip(video, config, stride, view, views)


def _clip(video: Video, config: Experiment, stride: int, view: int, views: int) -> Clip:
    geometry = config.model.geometry
    fitting = max(1, min(stride, (video.num_frames - 1) // (geometry.num_frames - 1)))
    frames = ClipFrames(geometry.num_frames, fitting, "stride", hold_last_frame=False)

    def need(size: Size) -> Any:
        return needed_by([view_box(size.height, size.width, 0, 1)], geometry.image_size)

    found = video.read_needed(frames.for_view(video.num_frames, view, views), need)
    box = view_box(found.size.height, found.size.width, 0, 1)
    moved = None if found.motion is None else crop_motion(found.motion, box, geometry)
    return Clip(crop_pictures(found, box, geometry.image_size, False, None), moved)


def draw_clips(size: int) -> list[Path]:
    """Synthesise two videos of each motion and return their files."""
    folder = Path(tempfile.mkdtemp())
    count = 2 * len(MOTIONS)
    synthesize(folder, {"test": count}, SyntheticSpec(num_frames=32, size=size), workers=2)
    return sorted((folder / "test").glob("*.mp4"))


def compare(
    batch: list[Clip], configs: list[Experiment], embedding: PixelMap, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each config; the overlap is measured against the selection of the first."""
    rows, geometry = [], configs[0].model.geometry
    every = torch.stack([clip.pixels for clip in batch])
    exact_BK = select(configs[0], batch, embedding)
    exact_error_B = moving_error(every, exact_BK, geometry)
    for config in configs:
        usable = [
            i for i, clip in enumerate(batch) if clip.moved is not None or not config.tokens.reads_motion
        ]
        used = [batch[i] for i in usable]
        if not used:
            continue
        keep_BK = select(config, used, embedding)
        pairs = zip(exact_BK[usable].tolist(), keep_BK.tolist(), strict=True)
        overlaps = [len(set(exact) & set(keep)) / len(exact) for exact, keep in pairs]
        error_B = moving_error(every[usable], keep_BK, geometry)
        seconds = timed(config, used, embedding, rounds)
        rows.append(
            {
                "rule": config.tokens.selection,
                "score": config.tokens.score if config.tokens.rule.scores else "-",
                "distance": config.tokens.distance if config.tokens.rule.scores else "-",
                "clips": len(used),
                "overlap_pct": round(100 * statistics.fmean(overlaps), 1),
                "worst_clip_pct": round(100 * min(overlaps), 1),
                "moving_rmse": round(error_B.mean().item(), 1),
                "against_exact": round((error_B - exact_error_B[usable]).mean().item(), 1),
                "mmacs_per_clip": round(predict_macs(config).score_macs / 1e6, 1),
                "ms_per_clip": round(1000 * seconds / len(used), 2),
            }
        )
    return rows


def select(config: Experiment, clips: list[Clip], embedding: PixelMap) -> Tensor:
    """Return the kept tokens (B, K) of clips."""
    moved = [clip.moved for clip in clips if clip.moved is not None]
    pixels = torch.stack([clip.pixels for clip in clips])
    return kept_tokens(config, pixels, moved, embedding)


def timed(config: Experiment, clips: list[Clip], embedding: PixelMap, rounds: int) -> float:
    """Return the median seconds of a config's selection on clips; motion vectors are already read."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        select(config, clips, embedding)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def draw(clip: Clip, configs: list[Experiment], embedding: PixelMap) -> bytes:
    """Draw a PNG of 128 colours: a row per rule and score, a column per slot; discarded tokens are dim."""
    geometry, rows, labels = configs[0].model.geometry, [], []
    pixels = to_tubelets(clip.pixels[None], geometry).float()
    for config in configs:
        tokens = config.tokens
        if tokens.distance != "l2" or (tokens.reads_motion and clip.moved is None):
            continue
        light = torch.full((1, geometry.num_tokens), _DIM).scatter(1, select(config, [clip], embedding), 1.0)
        frames = from_tubelets(pixels * light[..., None], geometry)[0, :: geometry.tubelet_size]
        small = F.interpolate(frames.movedim(3, 1), (_SIDE, _SIDE), mode="area").movedim(1, 3)
        rows.append(np.concatenate(list(small.byte().numpy()), axis=1))
        labels.append(tokens.score if tokens.rule.scores else tokens.selection)
    shown = np.concatenate(rows)
    height, width = shown.shape[:2]
    figure, axes = new_figure(width / 90 + 0.8, height / 90 + 0.2)
    axes.imshow(shown)
    axes.set_yticks([(i + 0.5) * _SIDE for i in range(len(rows))], labels)
    axes.set_xticks([])
    packed = io.BytesIO()
    Image.open(io.BytesIO(to_png(figure))).convert("RGB").quantize(128).save(packed, "PNG", optimize=True)
    return packed.getvalue()


if __name__ == "__main__":
    run_program(main)
