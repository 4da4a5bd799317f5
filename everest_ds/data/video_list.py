"""Manifests: lists of videos and, if known, their classes.

A manifest is UTF-8 text with one `path label` per line, like VideoMAE's lists. Path and label are separated
by spaces, a tab, a comma or a semicolon. The label is the last field, so the path itself may contain
separators, or be enclosed in double quotes as in CSV. `path#34-274 label` denotes frames 34 to 273 of a
longer video. Empty lines and lines that begin with `#` are ignored.
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
_LAYOUT = "FOLDER/CLASS/VIDEO, where the video's suffix is one of " + " ".join(VIDEO_SUFFIXES)
_FORM = "`path label` with a whole number from 0 as label, separated by a space, tab, comma or semicolon"
_SEPARATOR = r"(?:[ \t]*[,;][ \t]*|[ \t]+)"
_LABEL = r"(?P<label>-?[0-9]{1,18})"
_SPAN = r"(?:#(?P<first>[0-9]{1,12})-(?P<stop>[0-9]{1,12}))?"
_QUOTED = re.compile(rf'"(?P<path>(?:[^"]|"")+)"{_SPAN}(?:{_SEPARATOR}{_LABEL})?')
_PLAIN = re.compile(rf"(?P<path>.+?){_SPAN}(?:{_SEPARATOR}{_LABEL})?")
_NOT_IN_A_LINE = re.compile(r"[\n\r\ud800-\udfff]")  # line ends, and names that are not UTF-8
_BLANKS = " \t\r"


@dataclass(frozen=True)
class Sample:
    """One video, or a span of its frames.

    Attributes:
        path: the file.
        label: index of its class, from 0; None if the manifest has none.
        span: the sample's frames, from span[0] up to but excluding span[1]; None for the whole video.
    """

    path: Path
    label: int | None
    span: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The file and span of the sample, by which messages and ledgers identify it."""
        return str(self.path) + _span_text(self.span)


def read_manifest(file: Path, *, root: Path | None, num_classes: int | None, labelled: bool) -> list[Sample]:
    """Read the samples of a manifest, in its order.

    Args:
        file: the manifest.
        root: folder that paths are relative to; None for the manifest's own folder.
        num_classes: number of classes; every label must be below this number. None for no limit.
        labelled: require a label on every line; otherwise a line may consist of a path alone.

    Raises:
        DataError: if the file is not a readable manifest or holds no sample, or a label is missing or out of
            range.
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
            raise DataError(
                f"{file}:{number}: the span holds no frames",
                given=repr(line),
                allowed="path#FIRST-STOP label, with FIRST below STOP",
            )
        samples.append(Sample(folder / path, label, span))
    if not samples:
        raise DataError(f"{file}: the manifest is empty", allowed=_FORM)
    return samples


def write_manifest(file: Path, samples: Iterable[Sample], root: Path) -> None:
    """Write `samples` so that `read_manifest` with the same `root` returns them unchanged.

    Paths below `root` are written relative to it, others as absolute paths.

    Raises:
        DataError: if a path cannot be written as a line of UTF-8 text.
    """
    text = "".join(f"{_line(sample, root)}\n" for sample in samples)
    file.write_text(text, encoding="utf-8", newline="\n")


def read_class_names(file: Path) -> list[str]:
    """Read the class names of a file with one name per line, in label order.

    Raises:
        DataError: if the file is not readable text, holds no name, or repeats a name.
    """
    names = [line for line in _lines(file, "list of class names") if line]
    if not names:
        raise DataError(f"{file}: no class names", allowed="one class name per line, in label order")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{file}: class names are repeated", given=", ".join(twice))
    return names


def index_folder(folder: Path) -> tuple[list[Sample], list[str]]:
    """Return the samples and class names of a folder that holds one folder of videos per class.

    Labels number the sorted class names; videos may lie in nested folders. Hidden folders and files that are
    not videos are ignored.

    Raises:
        DataError: if the folder does not exist or has no class folders, a class has no video, or a video lies
            outside the class folders.
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


def list_samples(source: Path) -> list[Sample]:
    """Return the samples of `source`: a folder (at any depth, without labels), a video file, or a manifest.

    Raises:
        DataError: if the file or folder does not exist, or holds no video.
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
    # splitlines() would also split at characters that file names may contain.
    return [line.strip(_BLANKS) for line in text.split("\n")]


def _parse(line: str) -> tuple[str, tuple[int, int] | None, int | None]:
    match = _QUOTED.fullmatch(line)
    path = match["path"].replace('""', '"') if match else ""
    match = match or _PLAIN.fullmatch(line)
    assert match is not None  # the plain form matches any non-empty line
    span = None if match["first"] is None else (int(match["first"]), int(match["stop"]))
    label = None if match["label"] is None else int(match["label"])
    return path or match["path"], span, label


def _span_text(span: tuple[int, int] | None) -> str:
    return "" if span is None else f"#{span[0]}-{span[1]}"


def _line(sample: Sample, root: Path) -> str:
    path = sample.path
    text = str(path.relative_to(root) if path.is_relative_to(root) else path.absolute())
    if _NOT_IN_A_LINE.search(text):
        raise DataError(f"{text!r}: this path cannot be written to a manifest", fix="rename the file")
    end = _span_text(sample.span) + ("" if sample.label is None else f" {sample.label}")
    plain = text + end
    same = _parse(plain) == (text, sample.span, sample.label)
    if plain == plain.strip(_BLANKS) and plain[0] not in "#\ufeff" and same:
        return plain
    return '"' + text.replace('"', '""') + '"' + end
