"""UCF101: `classInd.txt` and the lists of its three splits into training and test."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from everest_ds.data.official.annotations import AnnotatedVideo, Annotations, label_of, need_file, read_text
from everest_ds.errors import DataError


def read_ucf101(folder: Path, fold: int) -> Annotations:
    """Read the annotation in `folder` for split `fold`, 1 to 3."""
    file = need_file(folder, "classInd.txt")
    lines = [line.split() for line in read_text(file).splitlines() if line.strip()]
    if [line[0] for line in lines] != [str(number) for number in range(1, len(lines) + 1)]:
        raise DataError(f"{file}: the lines are not numbered from 1", allowed="`NUMBER CLASS` lines")
    names = [line[-1] for line in lines]
    numbers = {name: number for number, name in enumerate(names)}
    lists = {split: need_file(folder, f"{split}list{fold:02d}.txt") for split in ("train", "test")}
    return Annotations(names, {split: _read_list(lists[split], numbers) for split in lists})


def _read_list(file: Path, numbers: dict[str, int]) -> list[AnnotatedVideo]:
    """Read a list of `CLASS/VIDEO.avi`; the class number after it in training lists repeats the folder."""
    paths = [PurePosixPath(line.split()[0]) for line in read_text(file).splitlines() if line.strip()]
    return [
        AnnotatedVideo((str(path.with_suffix("")),), label_of(path.parent.name, numbers, file))
        for path in paths
    ]
