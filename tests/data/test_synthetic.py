"""Tests of synthetic data: labels are motions, no frame alone reveals them, equal seeds give equal files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from everest_ds.data.decoding.open_video import open_video
from everest_ds.data.synthetic import KINDS, MOTIONS, SyntheticSpec, object_cover, render_video, synthesize
from everest_ds.data.video_list import read_class_names, read_manifest

SPEC = SyntheticSpec(num_frames=12, size=48)


def video(label: int, seed: int, spec: SyntheticSpec = SPEC) -> np.ndarray:
    return render_video(label, np.random.default_rng(seed), spec).astype(np.int64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_some_frame_is_the_same_whatever_the_label(seed: int, kind: str) -> None:
    spec = replace(SPEC, kind=kind)
    videos = [video(label, seed, spec) for label in range(len(MOTIONS))]
    spread = np.max([np.abs(v - videos[0]).max(axis=(1, 2, 3)) for v in videos], axis=0)
    assert spread.min() == 0  # at the reference frame
    assert spread.max() > 50  # at some other frame


def object_center(moving: np.ndarray, still: np.ndarray) -> tuple[float, float]:
    """Return the circular mean position of the difference of two frames, in pixels."""
    weight = np.abs(moving - still).sum(axis=-1).astype(float)
    size = weight.shape[0]
    angle = 2 * np.pi * np.arange(size) / size

    def along(profile: np.ndarray) -> float:
        return float(np.angle((profile * np.exp(1j * angle)).sum()) * size / (2 * np.pi) % size)

    return along(weight.sum(axis=1)), along(weight.sum(axis=0))


@pytest.mark.parametrize(
    "motion, axis, sign", [("left", 1, -1), ("right", 1, 1), ("up", 0, -1), ("down", 0, 1)]
)
def test_the_object_moves_as_the_label_says(motion: str, axis: int, sign: int) -> None:
    moves = []
    for seed in range(12):
        frames = video(MOTIONS.index(motion), seed)
        background = np.median(frames, axis=0)
        first, last = (object_center(frames[i], background)[axis] for i in (0, 6))
        moves.append((last - first + 24) % 48 - 24)
    assert np.median(moves) * sign > 3


@pytest.mark.parametrize("label", range(len(MOTIONS)))
def test_a_pausing_object_moves_in_one_short_stretch(label: int) -> None:
    frames = video(label, 3, SyntheticSpec(num_frames=24, size=48, kind="pauses"))
    changes = np.flatnonzero((frames[1:] != frames[:-1]).any(axis=(1, 2, 3)))
    assert changes.tolist() == list(range(changes[0], changes[0] + 6))  # a quarter of 24


def test_in_a_busy_video_everything_changes_and_the_object_is_not_alone() -> None:
    spec = replace(SPEC, kind="busy")
    change = np.abs(np.diff(video(0, 1, spec), axis=0)).mean(axis=-1)
    assert (change > 0).mean() > 0.95
    lone = np.abs(np.diff(video(0, 1), axis=0)).mean(axis=-1)
    assert (change > 25).sum() > (lone > 25).sum()


def test_in_a_panning_video_the_background_changes_as_much_as_the_object() -> None:
    spec = replace(SPEC, kind="panning")
    changes = [
        np.abs(np.diff(video(seed % len(MOTIONS), seed, spec), axis=0)).mean(axis=-1) for seed in range(6)
    ]
    assert np.mean([change > 10 for change in changes]) > 0.7
    covered = [object_cover(i % len(MOTIONS), np.random.default_rng(i), spec)[1:] > 0.5 for i in range(6)]
    inside, outside = (
        np.mean([c[m].mean() for c, m in zip(changes, masks, strict=True)])
        for masks in (covered, [~mask for mask in covered])
    )
    assert 0.5 < inside / outside < 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_cover_is_where_the_object_changes_the_picture(kind: str) -> None:
    spec = replace(SPEC, kind=kind)
    shown, empty = (render_video(4, np.random.default_rng(5), spec, show) for show in (True, False))
    differs = (shown != empty).any(axis=-1)
    covered = object_cover(4, np.random.default_rng(5), spec)
    assert not differs[covered == 0].any() and differs[covered == 1].mean() > 0.95


def test_pace_is_how_much_happens_between_frames() -> None:
    moves = {}
    for pace in (1.0, 2.0):
        spec = replace(SPEC, num_frames=3, kind="pauses", pace=pace)
        shown = [video(MOTIONS.index("right"), seed, spec) for seed in range(12)]
        moves[pace] = np.median([np.abs(np.diff(frames, axis=0)).sum() for frames in shown])
    assert 1.4 < moves[2.0] / moves[1.0] < 2.2


def test_equal_seeds_give_equal_files_and_labels_are_balanced(tmp_path: Path) -> None:
    counts = {"train": 12, "val": 6}
    for name in ("a", "b"):
        synthesize(tmp_path / name, counts, SPEC, workers=1)
    for file in ("train.txt", "val.txt", "classes.txt", "train/00007.mp4", "val/00003.mp4"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    names = read_class_names(tmp_path / "a" / "classes.txt")
    samples = read_manifest(tmp_path / "a" / "train.txt", root=None, num_classes=len(names), labelled=True)
    assert names == list(MOTIONS)
    assert np.bincount([s.label for s in samples if s.label is not None]).tolist() == [2] * 6


def test_files_hold_what_was_drawn(tmp_path: Path) -> None:
    synthesize(tmp_path, {"test": 2}, SPEC, workers=1)
    with open_video(tmp_path / "test" / "00001.mp4") as opened:
        stored = opened.read(range(opened.num_frames)).numpy().astype(np.int64)
    drawn = render_video(1, np.random.default_rng([0, 2, 1]), SPEC)
    assert stored.shape == drawn.shape
    assert np.abs(stored - drawn).mean() < 12  # H.264 halves the colour resolution
