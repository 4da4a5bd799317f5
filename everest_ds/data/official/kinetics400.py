"""Kinetics-400: DeepMind's `train`, `val` and `test` as CSV or JSON; files named YOUTUBEID_SSSSSS_EEEEEE.

Labels number the class names in alphabetical order, as all published models do. The first release of the
test split has no labels.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from everest_ds.data.official.annotations import (
    AnnotatedVideo,
    Annotations,
    find_file,
    label_of,
    need_file,
    read_json,
    read_rows,
)
from everest_ds.errors import DataError

_SPLITS = {"train": ("train",), "val": ("val", "validate", "validation"), "test": ("test",)}


class _Clip(NamedTuple):
    video: str
    start_s: str
    end_s: str
    label: str


def read_kinetics400(folder: Path, fold: int) -> Annotations:
    """Read the annotation in `folder`; the data set has one fold."""
    needed = need_file(folder, *_names("train"))
    files = {split: find_file(folder, *_names(split)) for split in _SPLITS}
    clips = {split: list(_clips(file)) for split, file in files.items() if file is not None}
    names = sorted({clip.label for part in clips.values() for clip in part if clip.label})
    numbers = {name: number for number, name in enumerate(names)}
    splits: dict[str, list[AnnotatedVideo]] = {split: [] for split in clips}
    for split, clip in ((split, clip) for split, part in clips.items() for clip in part):
        cut = f"{clip.video}_{int(float(clip.start_s)):06d}_{int(float(clip.end_s)):06d}"
        label = label_of(clip.label, numbers, needed) if clip.label else None
        splits[split].append(AnnotatedVideo((cut, clip.video), label))
    return Annotations(names, splits)


def _names(split: str) -> list[str]:
    return [
        f"{prefix}{name}.{suffix}"
        for suffix in ("csv", "json")
        for prefix in ("", "kinetics_", "kinetics400_", "kinetics_400_")
        for name in _SPLITS[split]
    ]


def _clips(file: Path) -> Iterator[_Clip]:
    if file.suffix == ".csv":
        for row in read_rows(file, "youtube_id", "time_start", "time_end"):
            yield _Clip(row["youtube_id"], row["time_start"], row["time_end"], _plain(row.get("label") or ""))
        return
    for video, facts in read_json(file).items():
        try:
            start, end = facts["annotations"]["segment"]
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{file}: no annotations.segment", given=video) from None
        yield _Clip(video, start, end, _plain(facts["annotations"].get("label") or ""))


def _plain(label: str) -> str:
    """Normalise a class name: some releases quote class names, others use underscores for spaces."""
    return label.strip().strip('"').replace("_", " ")
