"""Manifests: which videos there are and, where known, of which class.

A manifest is UTF-8 text with one `path label` a line, as VideoMAE's lists are. Path and label are separated
by spaces, a tab, a comma or a semicolon; the label is the last field, so a path may hold separators itself,
or stand in double quotes as in CSV. `path#34-274 label` stands for the frames 34 to 273 of a longer video.
Empty lines and lines that begin with `#` do not count.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from everest_ds.errors import DataError, UsageError

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".ogv", ".mpg", ".mpeg")
_LAYOUT = "FOLDER/CLASS/VIDEO, a video being a file in " + " ".join(VIDEO_SUFFIXES)
_FORM = "`path label`, the label a whole number from 0, the separator a space, tab, comma or semicolon"
_SEPARATOR = r"(?:[ \t]*[,;][ \t]*|[ \t]+)"
_LABEL = r"(?P<label>-?[0-9]{1,18})"
_SPAN = r"(?:#(?P<first>[0-9]{1,12})-(?P<stop>[0-9]{1,12}))?"
_QUOTED = re.compile(rf'"(?P<path>(?:[^"]|"")+)"{_SPAN}(?:{_SEPARATOR}{_LABEL})?')
_PLAIN = re.compile(rf"(?P<path>.+?){_SPAN}(?:{_SEPARATOR}{_LABEL})?")
_NOT_IN_A_LINE = re.compile(r"[\n\r\ud800-\udfff]")  # line ends, and names that are not UTF-8
_BLANKS = " \t\r"


@dataclass(frozen=True)
class Sample:
    """One video, or a part of one.

    Attributes:
        path: the file.
        label: its class, from 0; None where the manifest has none.
        span: the part, from frame span[0] up to before span[1]; None: all of it.
    """

    path: Path
    label: int | None
    span: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The file, and which part of it: what messages and ledgers call this sample."""
        return str(self.path) + _span_text(self.span)


def read_manifest(file: Path, *, root: Path | None, num_classes: int | None, labelled: bool) -> list[Sample]:
    """The samples of a manifest, in its order.

    Args:
        file: the manifest.
        root: folder of the relative paths; None: the manifest's own.
        num_classes: labels end before it; None: they do not end.
        labelled: whether every line needs a label (else a line may be a path alone).

    Errors:
        DataError: not a readable manifest, no sample in it, a missing label or one out of range.
    """
    folder = file.parent if root is None else root
    samples = []
    for number, line in enumerate(_lines(file, "manifest"), start=1):
        if not line or line.startswith("#"):
            continue
        path, span, label = _parse(line)
        if label is None and labelled:
            raise DataError(f"{file}:{number}: no label", given=repr(line), allowed=_FORM)
        if label is not None and (label < 0 or (num_classes is not None and label >= num_classes)):
            allowed = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
            raise DataError(f"{file}:{number}: label out of range", given=label, allowed=allowed)
        if span is not None and span[0] >= span[1]:
            raise DataError(f"{file}:{number}: no frames", given=repr(line), allowed="path#FIRST-STOP label")
        samples.append(Sample(folder / path, label, span))
    if not samples:
        raise DataError(f"{file}: the manifest is empty", allowed=_FORM)
    return samples


def write_manifest(file: Path, samples: Iterable[Sample], root: Path) -> None:
    """Write `samples` so that `read_manifest` with the same `root` gives them back.

    Paths below `root` are written relative to it, others absolute.

    Errors:
        DataError: a path that a line of UTF-8 cannot hold.
    """
    text = "".join(f"{_line(sample, root)}\n" for sample in samples)
    file.write_text(text, encoding="utf-8", newline="\n")


def read_class_names(file: Path) -> list[str]:
    """The class names of a file with one a line, in label order.

    Errors:
        DataError: not a readable text, no name in it, or a name that comes twice.
    """
    names = [line for line in _lines(file, "list of class names") if line]
    if not names:
        raise DataError(f"{file}: no class names", allowed="one class name a line, in label order")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{file}: class names come twice", given=", ".join(twice))
    return names


def index_folder(folder: Path) -> tuple[list[Sample], list[str]]:
    """The samples and class names of a folder with a folder of videos per class.

    Class names are sorted and give the labels; videos may lie in further folders below. Hidden folders and
    files that are no videos do not count.

    Errors:
        DataError: no such folder, no class, a class without a video, or a video outside the classes.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder", allowed=_LAYOUT)
    loose = [path.name for path in sorted(folder.iterdir()) if _is_video(path)]
    if loose:
        raise DataError(f"{folder}: videos outside a class folder", given=loose[0], allowed=_LAYOUT)
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise DataError(f"{folder}: no class folders", allowed=_LAYOUT)
    samples = [Sample(path, i) for i, name in enumerate(names) for path in _videos(folder / name)]
    return samples, names


def split_samples(
    samples: Sequence[Sample], fractions: tuple[float, float, float], seed: int
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Deal `samples` into train, val and test, each class in proportion; the same seed deals the same.

    The order of `samples` does not matter; each part comes sorted by label and path.

    Errors:
        UsageError: fractions that are negative or do not sum to 1.
    """
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1):
        raise UsageError("split fractions", given=fractions, allowed="three shares, 0 or more, sum 1")
    parts: tuple[list[Sample], list[Sample], list[Sample]] = ([], [], [])
    shuffled = sorted(samples, key=_order)
    random.Random(seed).shuffle(shuffled)
    # Class after class, each to the part that is furthest behind: small classes round up and down in turn.
    for dealt, sample in enumerate(sorted(shuffled, key=_class), start=1):
        behind = [fraction * dealt - len(part) for fraction, part in zip(fractions, parts, strict=True)]
        parts[behind.index(max(behind))].append(sample)
    for part in parts:
        part.sort(key=_order)
    return parts


def list_samples(source: Path) -> list[Sample]:
    """The videos of a folder, however nested, without labels; of a manifest; or a single one.

    Errors:
        DataError: no such file or folder, or no video in it.
    """
    if source.is_dir():
        return [Sample(path, None) for path in _videos(source, "this folder")]
    if source.suffix.lower() in VIDEO_SUFFIXES:
        return [Sample(source, None)]
    return read_manifest(source, root=None, num_classes=None, labelled=False)


def _class(sample: Sample) -> int:
    return -1 if sample.label is None else sample.label


def _order(sample: Sample) -> tuple[int, Path, tuple[int, int]]:
    return _class(sample), sample.path, sample.span or (0, 0)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()


def _videos(folder: Path, whose: str = "this class") -> list[Path]:
    videos = sorted(path for path in folder.rglob("*") if _is_video(path))
    if not videos:
        raise DataError(f"{folder}: no videos in {whose}", allowed=" ".join(VIDEO_SUFFIXES))
    return videos


def _lines(file: Path, kind: str) -> list[str]:
    if not file.exists():
        raise DataError(f"{file}: no such {kind}")
    if not file.is_file():
        raise DataError(f"{file}: not a {kind}", given="a folder")
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: the {kind} is not UTF-8 text", given=f"byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot read the {kind}", given=error.strerror) from error
    # Not splitlines(): that would also end lines at characters that file names may hold.
    return [line.strip(_BLANKS) for line in text.split("\n")]


def _parse(line: str) -> tuple[str, tuple[int, int] | None, int | None]:
    match = _QUOTED.fullmatch(line)
    path = match["path"].replace('""', '"') if match else ""
    match = match or _PLAIN.fullmatch(line)
    assert match is not None  # the plain form takes any line that is not empty
    span = None if match["first"] is None else (int(match["first"]), int(match["stop"]))
    label = None if match["label"] is None else int(match["label"])
    return path or match["path"], span, label


def _span_text(span: tuple[int, int] | None) -> str:
    return "" if span is None else f"#{span[0]}-{span[1]}"


def _line(sample: Sample, root: Path) -> str:
    path = sample.path
    text = str(path.relative_to(root) if path.is_relative_to(root) else path.absolute())
    if _NOT_IN_A_LINE.search(text):
        raise DataError(f"{text!r}: a manifest cannot hold this path", fix="rename the file")
    end = _span_text(sample.span) + ("" if sample.label is None else f" {sample.label}")
    plain = text + end
    same = _parse(plain) == (text, sample.span, sample.label)
    if plain == plain.strip(_BLANKS) and plain[0] not in "#\ufeff" and same:
        return plain
    return '"' + text.replace('"', '""') + '"' + end
