"""HMDB51: one list per class and split, `CLASS_test_splitN.txt`; labels number the classes alphabetically."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from everest_ds.data.official.annotations import AnnotatedVideo, Annotations, read_text
from everest_ds.errors import DataError

# The last word of a line names the part of the split. Videos marked 0 are in neither part.
_PARTS: dict[str, str | None] = {"1": "train", "2": "test", "0": None}


def read_hmdb51(folder: Path, fold: int) -> Annotations:
    """Read the annotation in `folder` for split `fold`, 1 to 3."""
    ending = f"_test_split{fold}.txt"
    files = {file.name.removesuffix(ending): file for file in folder.glob(f"*{ending}")}
    if not files:
        raise DataError(f"{folder}: no split lists", allowed=f"CLASS{ending}, one per class")
    splits: dict[str, list[AnnotatedVideo]] = {"train": [], "test": []}
    for label, name in enumerate(sorted(files)):
        for split, video in _lines(files[name]):
            splits[split].append(AnnotatedVideo((f"{name}/{PurePosixPath(video).with_suffix('')}",), label))
    return Annotations(sorted(files), splits)


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield (part, video) for each line whose video belongs to the training or test part."""
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        video, _, word = line.strip().rpartition(" ")
        if not line.strip():
            continue
        if word not in _PARTS:
            allowed = "0, 1 or 2 at the end"
            subject = f"{file}:{number}: the line names no part of the split"
            raise DataError(subject, given=repr(line), allowed=allowed)
        part = _PARTS[word]
        if part is not None:
            yield part, video.strip()
