"""Indexing of a folder that holds one folder of videos per class, and its division into splits."""

from __future__ import annotations

import math
import random
import stat
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from everest_ds.data.video_files import (
    VIDEO_SUFFIXES,
    Skipped,
    describe_skipped,
    find_videos,
    is_hidden,
)
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError, UsageError

_FileId = tuple[int, int]  # device and inode
_LAYOUT = "FOLDER/CLASS/VIDEO, where the video's suffix is one of " + " ".join(VIDEO_SUFFIXES)


class IndexedFolder(NamedTuple):
    """The videos of a folder with one folder per class.

    Attributes:
        samples: the videos with their labels, class by class.
        classes: the names of the class folders, in label order.
        skipped: what lies in the class folders and is not indexed.
    """

    samples: list[Sample]
    classes: list[str]
    skipped: Skipped


def index_folder(folder: Path) -> IndexedFolder:
    """Index the videos of a folder that holds one folder of videos per class.

    Labels number the sorted class names; videos may lie in nested folders, and links are followed. Hidden
    files and folders, empty files and files that are not videos are skipped, and a file that has several
    names in its class counts once.

    Raises:
        DataError: if the folder does not exist or has no class folders, a class has no video, a video lies
            outside the class folders, or one file lies in two classes.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder", allowed=_LAYOUT)
    inside = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    loose = next((p for p in inside if p.suffix.lower() in VIDEO_SUFFIXES and p.is_file()), None)
    if loose is not None:
        raise DataError(f"{folder}: videos outside a class folder", given=loose.name, allowed=_LAYOUT)
    classes = [path.name for path in inside if path.is_dir()]
    if not classes:
        raise DataError(f"{folder}: no class folders", allowed=_LAYOUT)
    skipped: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()):
        if is_hidden(path.name):
            skipped["hidden folders" if path.is_dir() else "hidden files"].append(path)
    samples: dict[_FileId, Sample] = {}
    for label, name in enumerate(classes):
        for reason, paths in _add_class(folder / name, label, samples).items():
            skipped[reason] += paths
    return IndexedFolder(list(samples.values()), classes, skipped)


def _add_class(folder: Path, label: int, samples: dict[_FileId, Sample]) -> Skipped:
    """Add the videos of a class to `samples`, and return what was skipped."""
    found, before = find_videos(folder), len(samples)
    ignored = {reason: list(paths) for reason, paths in found.skipped.items()}
    for path in found.videos:
        _add_video(Sample(path, label), samples, ignored)
    if len(samples) == before:
        there = "; ".join(describe_skipped(ignored, folder)) or "an empty folder"
        raise DataError(f"{folder}: no videos in this class", given=there, allowed=" ".join(VIDEO_SUFFIXES))
    return ignored


def _add_video(sample: Sample, samples: dict[_FileId, Sample], ignored: dict[str, list[Path]]) -> None:
    """Add a sample to `samples`, or its path to `ignored` if there is no such file or it was added before."""
    try:
        status = sample.path.stat()
    except OSError:
        ignored.setdefault("links that lead nowhere", []).append(sample.path)
        return
    if not stat.S_ISREG(status.st_mode) or not status.st_size:
        ignored.setdefault("empty files", []).append(sample.path)
        return
    other = samples.setdefault((status.st_dev, status.st_ino), sample)
    if other.label != sample.label:
        raise DataError(
            "one video file lies in two classes",
            given=f"{other.path} and {sample.path}",
            fix="keep it in one of them, because a video has one label",
        )
    if other is not sample:
        ignored.setdefault("further names of an indexed file", []).append(sample.path)


def split_samples(
    samples: Sequence[Sample], fractions: tuple[float, float, float], seed: int
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Split `samples` into train, val and test, each class in proportion, reproducibly for a given seed.

    The order of `samples` does not matter; each split is sorted by label and path.

    Raises:
        UsageError: if a fraction is negative, or the fractions do not sum to 1.
    """
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise UsageError(
            "invalid split fractions", given=fractions, allowed="three fractions, 0 or more, that sum to 1"
        )
    parts: tuple[list[Sample], list[Sample], list[Sample]] = ([], [], [])
    shuffled = sorted(samples, key=_order)
    random.Random(seed).shuffle(shuffled)
    # Class by class, each sample goes to the split that is furthest below its share, so that the rounding of
    # small classes evens out.
    for dealt, sample in enumerate(sorted(shuffled, key=_class), start=1):
        behind = [fraction * dealt - len(part) for fraction, part in zip(fractions, parts, strict=True)]
        parts[behind.index(max(behind))].append(sample)
    for part in parts:
        part.sort(key=_order)
    return parts


def _class(sample: Sample) -> int:
    return -1 if sample.label is None else sample.label


def _order(sample: Sample) -> tuple[int, Path, tuple[int, int]]:
    return _class(sample), sample.path, sample.span or (0, 0)
