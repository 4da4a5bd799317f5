"""A synthetic, labelled *motion* data set of real H.264 files, for trying the system without a download.

A textured object moves over a still, a noisy or a panning background; the label is the kind of motion. At one
random reference frame of each clip the picture does not depend on the label at all, and positions wrap
around, so no single frame reveals the motion: a model must compare frames. `KINDS` lists variants of the
data set that are harder or hold less motion.

Arrays are (frame, row, column, colour) unless stated otherwise; lengths are in pixels, times in frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from everest_ds.data.video_list import Sample, write_manifest
from everest_ds.errors import DataError
from everest_ds.output_paths import output_below

Floats = NDArray[np.floating]
Frames = NDArray[np.uint8]

# Displacement direction in (row, column); orbits turn with the given sign (rows grow downwards).
_STRAIGHT = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
_ORBITS = {"clockwise": 1, "counterclockwise": -1}
MOTIONS: tuple[str, ...] = (*_STRAIGHT, *_ORBITS)
BACKGROUNDS: tuple[str, ...] = ("still", "noisy", "panning")
# Ranges of pixel values. They overlap, so that colour alone does not separate an object from its background.
OBJECT_LEVELS = (0.0, 255.0)
BACKGROUND_LEVELS = (105.0, 135.0)
# As fractions of the frame's side: displacement from one frame to the next, and the width of the objects.
_SPEEDS = (0.02, 0.035)
_OBJECT, _DISTRACTOR = 0.36, 0.18
# A data set has few objects and scenes, because pre-training learns only what recurs.
NUM_SPRITES = 6
NUM_SCENES = 6
SPLITS: tuple[str, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class SceneStyle:
    """A variant of the data set: its background, camera noise, distractors and share of frames with motion.

    Attributes:
        background: one of BACKGROUNDS for all videos; None draws a background for each video.
        noise: standard deviation of the camera noise over the whole picture, in levels.
        distractors: number of smaller objects that drift along straight lines of their own.
        moving: share of the frames in which the object moves, as one contiguous stretch; the object rests
            before and after it.
        pan: speed of a panning camera, in sides of the frame per frame; None draws a speed for each video.
        scene: cells along the side of a background, between which colours are interpolated, and their range.
    """

    background: str | None = None
    noise: float = 0.0
    distractors: int = 0
    moving: float = 1.0
    pan: float | None = None
    scene: tuple[int, tuple[float, float]] = (6, BACKGROUND_LEVELS)


KINDS: dict[str, SceneStyle] = {
    "plain": SceneStyle(),
    "busy": SceneStyle("panning", noise=8.0, distractors=2),
    "pauses": SceneStyle("still", moving=0.25),
    # The camera moves as fast as the object, over a background with as much contrast: everything changes.
    "panning": SceneStyle("panning", pan=0.025, scene=(12, OBJECT_LEVELS)),
}


@dataclass(frozen=True)
class SyntheticSpec:
    """The parameters of a synthetic data set.

    Attributes:
        num_frames: frames per video.
        size: height and width of the frames, in pixels.
        seed: random seed; every video is a function of (seed, split, index).
        kind: one of KINDS.
        pace: speed of all motion, relative to 1; at 4, consecutive frames differ as much as frames that lie 4
            apart do at 1.
    """

    num_frames: int
    size: int
    seed: int = 0
    kind: str = "plain"
    pace: float = 1.0


def render_video(
    label: int, rng: np.random.Generator, spec: SyntheticSpec, show_object: bool = True
) -> Frames:
    """Draw one clip of motion `label` (an index into MOTIONS): uint8 (F, size, size, 3).

    Every random number is drawn independently of the label, so two labels with equal generators show the same
    picture at the reference frame.

    Args:
        label: index of the motion in MOTIONS.
        rng: random generator of the clip.
        spec: the parameters of the data set.
        show_object: False leaves the object out and draws the rest as an equal generator would with it.
    """
    kind = KINDS[spec.kind]
    sprite, mask, centers = _moving_object(label, rng, spec)
    mask = mask * show_object
    frames = _background(rng, spec, _scenes(spec.seed, spec.size, *kind.scene)[rng.integers(NUM_SCENES)])
    for _ in range(kind.distractors):
        frames = _with_distractor(list(frames), rng, spec)
    shown = np.stack([_paste(b, sprite, mask, c) for b, c in zip(frames, centers, strict=True)])
    if kind.noise:
        shown = shown + rng.normal(0, kind.noise, shown.shape).astype(np.float32)
    return shown.clip(0, 255).astype(np.uint8)


def object_cover(label: int, rng: np.random.Generator, spec: SyntheticSpec) -> Floats:
    """Return the share of each pixel that the object covers in the clip that `render_video` would draw.

    Args:
        label: index of the motion in MOTIONS.
        rng: random generator of the clip.
        spec: the parameters of the data set.

    Returns:
        float32 (F, size, size).
    """
    _, mask, centers = _moving_object(label, rng, spec)
    empty = np.zeros((spec.size, spec.size, 1), dtype=np.float32)
    return np.stack([_paste(empty, np.ones_like(mask), mask, center)[..., 0] for center in centers])


def video_generator(spec: SyntheticSpec, split: str, index: int) -> np.random.Generator:
    """Return the random generator of a data set's video, whose label is `index` modulo the motions."""
    return np.random.default_rng([spec.seed, SPLITS.index(split), index])


def synthesize(
    folder: Path,
    counts: dict[str, int],
    spec: SyntheticSpec,
    workers: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Path]:
    """Write `counts[split]` videos per split with balanced labels, a manifest per split, and the class names.

    Args:
        folder: target folder, created if needed; existing videos are overwritten.
        counts: number of videos per split, with keys from SPLITS.
        spec: the parameters of the data set.
        workers: number of processes.
        on_progress: called with the number of videos written so far.

    Returns:
        The manifests, in the order of `counts`.

    Raises:
        DataError: if the folder cannot be written, or no H.264 encoder is installed.
        UsageError: if a link in the folder leads out of it.
    """
    for split, count in counts.items():
        for place in (f"{split}.txt", *(_relative_path(split, index) for index in range(count))):
            output_below(folder, Path(place), ())
    jobs = [(folder, split, index, spec) for split, count in counts.items() for index in range(count)]
    try:
        for split in counts:
            (folder / split).mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(workers) as pool:
            for done, _ in enumerate(pool.map(_write_one, jobs, chunksize=8), start=1):
                on_progress(done)
        (folder / "classes.txt").write_text("\n".join(MOTIONS) + "\n")
        manifests = {folder / f"{split}.txt": (split, count) for split, count in counts.items()}
        for manifest, (split, count) in manifests.items():
            labels = [(folder / _relative_path(split, i), i % len(MOTIONS)) for i in range(count)]
            write_manifest(manifest, [Sample(path, label) for path, label in labels], folder)
        return list(manifests)
    except OSError as error:
        raise DataError(f"{folder}: cannot write the data set", given=str(error)) from None


def _relative_path(split: str, index: int) -> str:
    return f"{split}/{index:05d}.mp4"


def _write_one(job: tuple[Path, str, int, SyntheticSpec]) -> None:
    folder, split, index, spec = job
    frames = render_video(index % len(MOTIONS), video_generator(spec, split, index), spec)
    write_video(folder / _relative_path(split, index), frames)


def write_video(path: Path, frames: Frames, fps: int = 15, gop: int = 12) -> None:
    """Encode uint8 RGB frames (F, H, W, 3) as near-lossless H.264 (4:2:0, crf 16).

    Args:
        path: the file to write.
        frames: the frames to encode.
        fps: frames per second.
        gop: number of frames from one key frame to the next.
    """
    import av  # imported here because it is slow to import, and only writing needs it

    with av.open(str(path), "w") as container:
        try:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "16", "preset": "veryfast"})
        except ValueError:
            raise DataError("no H.264 encoder in PyAV's FFmpeg", fix="pip install --upgrade av") from None
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.gop_size = gop
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _moving_object(
    label: int, rng: np.random.Generator, spec: SyntheticSpec
) -> tuple[Floats, Floats, Floats]:
    """Draw the object of a clip: texture, outline, and the centre (row, column) in every frame (F, 2)."""
    size = spec.size
    time = spec.pace * _moving_time(rng, spec.num_frames, KINDS[spec.kind].moving)
    speed = rng.uniform(*_SPEEDS) * size
    phase = rng.uniform(0, 2 * np.pi)
    origin = rng.uniform(0, size, 2)
    sprite, mask = _sprites(spec.seed, round(_OBJECT * size))[rng.integers(NUM_SPRITES)]
    return sprite, mask, origin + _path(MOTIONS[label], time, speed, phase, 0.12 * size)


def _moving_time(rng: np.random.Generator, num_frames: int, moving: float) -> Floats:
    """Return for each frame (F,) how many frames the object has moved since a random reference frame."""
    reference = rng.integers(num_frames)
    elapsed = np.arange(num_frames, dtype=np.float64)
    if moving < 1:
        length = max(1, round(moving * num_frames))
        elapsed = (elapsed - rng.integers(num_frames - length + 1)).clip(0, length)
    return elapsed - elapsed[reference]


def _path(motion: str, time: Floats, speed: float, phase: float, radius: float) -> Floats:
    """Return the displacement (F, 2) of the object from its position at time 0."""
    if motion in _STRAIGHT:
        return np.outer(time, _STRAIGHT[motion]).astype(np.float32) * np.float32(speed)
    angle = phase + _ORBITS[motion] * time * speed / radius
    circle = np.stack([np.sin(angle) - np.sin(phase), np.cos(angle) - np.cos(phase)], axis=1)
    return (radius * circle).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int, levels: tuple[float, float]) -> Floats:
    """Return a periodic texture (size, size, 3), interpolated from a coarse grid of colours in `levels`."""
    grid = rng.uniform(*levels, (cells, cells, 3)).astype(np.float32)
    return _bilinear(grid, *np.meshgrid(*[np.arange(size) * cells / size] * 2, indexing="ij"))


def _bilinear(image: Floats, row: NDArray[np.floating], column: NDArray[np.floating]) -> Floats:
    """Sample the periodic `image` (H, W, C) at fractional positions by bilinear interpolation."""
    height, width = image.shape[:2]
    r, c = np.floor(row).astype(int), np.floor(column).astype(int)
    fr, fc = (row - r)[..., None].astype(np.float32), (column - c)[..., None].astype(np.float32)
    r0, r1, c0, c1 = r % height, (r + 1) % height, c % width, (c + 1) % width
    top = image[r0, c0] * (1 - fc) + image[r0, c1] * fc
    bottom = image[r1, c0] * (1 - fc) + image[r1, c1] * fc
    return np.asarray(top * (1 - fr) + bottom * fr, dtype=np.float32)


@lru_cache(maxsize=2)
def _sprites(seed: int, side: int) -> list[tuple[Floats, Floats]]:
    """Return the objects of a data set: textures (side, side, 3) and outlines (side, side, 1) in {0, 1}."""
    rng = np.random.default_rng([seed, 1])
    y, x = np.meshgrid(*[np.linspace(-1, 1, side)] * 2, indexing="ij")
    outlines = (x**2 + y**2 <= 1, np.maximum(abs(x), abs(y)) <= 0.85, abs(x) + abs(y) <= 1.15)
    return [
        (_smooth_noise(rng, side, 3, OBJECT_LEVELS), outlines[i % 3].astype(np.float32)[..., None])
        for i in range(NUM_SPRITES)
    ]


@lru_cache(maxsize=1)
def _scenes(seed: int, size: int, cells: int, levels: tuple[float, float]) -> list[Floats]:
    """Return the backgrounds of a data set, periodic pictures (size, size, 3)."""
    rng = np.random.default_rng([seed, 2])
    return [_smooth_noise(rng, size, cells, levels) for _ in range(NUM_SCENES)]


def _background(rng: np.random.Generator, spec: SyntheticSpec, scene: Floats) -> Iterator[Floats]:
    style = KINDS[spec.kind]
    kind = style.background or BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
    size = scene.shape[0]
    scene = np.roll(scene, rng.integers(size, size=2), axis=(0, 1))
    drift = spec.pace * rng.uniform(-0.02, 0.02, 2) * size
    if style.pan is not None:
        drift *= spec.pace * style.pan * size / np.hypot(*drift)
    noise = rng.normal(0, 8, (spec.num_frames, size, size, 1)).astype(np.float32)
    grid = np.meshgrid(*[np.arange(size, dtype=np.float32)] * 2, indexing="ij")
    for i in range(spec.num_frames):
        if kind == "panning":
            yield _bilinear(scene, grid[0] + i * drift[0], grid[1] + i * drift[1])
        else:
            yield scene + noise[i] if kind == "noisy" else scene


def _with_distractor(
    frames: Sequence[Floats], rng: np.random.Generator, spec: SyntheticSpec
) -> Iterator[Floats]:
    """Add a small object that moves across the frames at a random speed and in a random direction."""
    side = round(_DISTRACTOR * spec.size)
    sprite, mask = _sprites(spec.seed, side)[rng.integers(NUM_SPRITES)]
    angle, start = rng.uniform(0, 2 * np.pi), rng.uniform(0, spec.size, 2)
    step = spec.pace * rng.uniform(*_SPEEDS) * spec.size * np.array([np.sin(angle), np.cos(angle)])
    return (_paste(frame, sprite, mask, start + i * step) for i, frame in enumerate(frames))


def _paste(background: Floats, sprite: Floats, mask: Floats, center: Floats) -> Floats:
    """Paste the sprite centred at fractional `center` (row, column), wrapping around the frame's edges."""
    size, side = background.shape[0], sprite.shape[0]
    offset = (np.arange(size)[None, :] - center[:, None] + side / 2) % size
    rows, columns = (np.flatnonzero(along <= side - 1) for along in offset)
    row, column = np.meshgrid(offset[0][rows], offset[1][columns], indexing="ij")
    alpha, window = _bilinear(mask, row, column), np.ix_(rows, columns)
    pasted = background.copy()
    pasted[window] = background[window] * (1 - alpha) + _bilinear(sprite, row, column) * alpha
    return pasted
