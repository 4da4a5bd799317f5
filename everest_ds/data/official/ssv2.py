"""Something-Something v2: JSON lists of videos with their templates; files named by number.

The labels file maps the templates, without brackets, to label numbers. Labels of the test split were released
later, as `id;template` lines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from everest_ds.data.official.annotations import (
    AnnotatedVideo,
    Annotations,
    find_file,
    label_of,
    need_file,
    read_json,
    read_text,
)
from everest_ds.errors import DataError

_PREFIX = "something-something-v2-"
_FILES = {"train": "train.json", "val": "validation.json", "test": "test.json"}
_ANSWERS = "test-answers.csv"


def read_ssv2(folder: Path, fold: int) -> Annotations:
    """Read the annotation in `folder`; the data set has one fold."""
    file = need_file(folder, *_either("labels.json"))
    numbers = {name: int(number) for name, number in read_json(file).items()}
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise DataError(f"{file}: the label numbers are not 0..{len(numbers) - 1}")
    files = {split: find_file(folder, *_either(name)) for split, name in _FILES.items()}
    files["train"] = need_file(folder, *_either(_FILES["train"]))
    answers_file = find_file(folder, *_either(_ANSWERS))
    lines = [] if answers_file is None else read_text(answers_file).splitlines()
    answers = {number: template for number, _, template in (line.partition(";") for line in lines if line)}
    splits = {
        split: [_annotated(entry, numbers, answers, file) for entry in read_json(file)]
        for split, file in files.items()
        if file is not None
    }
    return Annotations(sorted(numbers, key=numbers.__getitem__), splits)


def _either(name: str) -> tuple[str, str]:
    return _PREFIX + name, name


def _annotated(
    entry: dict[str, Any], numbers: dict[str, int], answers: dict[str, str], file: Path
) -> AnnotatedVideo:
    if "id" not in entry:
        raise DataError(f"{file}: an entry has no id", given=str(entry)[:80])
    number = str(entry["id"])
    template = entry.get("template") or answers.get(number)
    plain = template and template.replace("[", "").replace("]", "")
    label = None if plain is None else label_of(plain, numbers, file)
    return AnnotatedVideo((number,), label)
