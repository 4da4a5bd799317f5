"""Manifests: lists of videos and, if known, their classes.

A manifest is UTF-8 text with one `path label` per line, like VideoMAE's lists. Path and label are separated
by spaces, a tab, a comma or a semicolon. The label is the last field, so the path itself may contain
separators, or be enclosed in double quotes as in CSV; the label may then be in quotes too.
`path#34-274 label` denotes frames 34 to 273 of a longer video. Empty lines do not count, nor does a first
line that names columns, such as `path,label`. A line that begins with `#` is a comment, unless a video of
that name exists.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import overload

import numpy as np

from everest_ds.data.manifest_lines import (
    BLANKS,
    NO_LABEL,
    NO_SPAN,
    NOT_A_LABEL,
    NOT_TEXT,
    ManifestLine,
    SampleColumns,
    clean_text,
    is_header,
    parse_line,
    parse_manifest,
)
from everest_ds.data.store.layout import StoredFrames
from everest_ds.errors import DataError

_FORM = "`path label` with a whole number from 0 as label, separated by a space, tab, comma or semicolon"
_NOT_IN_A_LINE = re.compile(r"[\n\r\0\ud800-\udfff]")  # line ends, and names that are not UTF-8
_BLOCK = 8192  # samples whose names are decoded at a time


@dataclass(frozen=True)
class Sample:
    """One video, or a span of its frames.

    Attributes:
        path: the file.
        label: index of its class, from 0; None if the manifest has none.
        span: the sample's frames, from span[0] up to but excluding span[1]; None for the whole video.
        stored: the place of the frames, if they lie in a frame store. `path` is then the sample's name in
            the folder of the store, and no file.
    """

    path: Path
    label: int | None
    span: tuple[int, int] | None = None
    stored: StoredFrames | None = None

    @property
    def file(self) -> Path:
        """The file that holds the frames."""
        return self.path if self.stored is None else self.stored.shard

    @property
    def name(self) -> str:
        """The file and span of the sample, by which messages and ledgers identify it."""
        return str(self.path) + _span_text(self.span)


class SampleTable(Sequence[Sample]):
    """The samples of a manifest as compact arrays, of which each item is built when it is accessed.

    A table of a million samples takes about 70 MB and has no Python object per sample, so processes that are
    forked from this one share it, and other ranks receive it as it is.

    Attributes:
        columns: the samples.

    Args:
        folder: folder that the samples' paths are relative to.
        columns: the samples.
    """

    def __init__(self, folder: Path, columns: SampleColumns) -> None:
        self._folder = folder
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns.starts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        names, starts, stops, labels, spans, *_ = self.columns
        path = names[starts[index] : stops[index]].tobytes().decode()
        label, span = int(labels[index]), tuple(spans[index].tolist()) if len(spans) else NO_SPAN
        return Sample(
            Path(self._folder, path),
            None if label == NO_LABEL else label,
            None if span == NO_SPAN else span,
            self._stored(int(self.columns.lines[index])),
        )

    def _stored(self, line: int) -> StoredFrames | None:
        """Return the place of a sample in a store; the samples of a manifest have none."""
        return None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Sequence)
            and len(self) == len(other)
            and all(mine == its for mine, its in zip(self, other, strict=True))
        )

    __hash__ = None  # type: ignore[assignment]

    def names_and_labels(self) -> Iterator[tuple[str, int | None]]:
        """Yield the name and label of every sample, ten times faster than by building the samples."""
        top = str(self._folder)
        above = "" if top == "." else f"{top.rstrip('/')}/"
        for first in range(0, len(self), _BLOCK):
            names, starts, stops, labels, spans, *_ = self.columns.select(slice(first, first + _BLOCK))
            offset, text = starts[0], names[starts[0] : stops[-1]].tobytes()
            span_of = map(tuple, spans.tolist()) if len(spans) else repeat(NO_SPAN)
            bounds = (starts - offset).tolist(), (stops - offset).tolist()
            for start, stop, label, span in zip(*bounds, labels.tolist(), span_of, strict=False):
                path = text[start:stop].decode()
                name = path if path.startswith("/") else above + path if path else top
                end = "" if span == NO_SPAN else _span_text(span)
                yield name + end, None if label == NO_LABEL else label

    def without(self, rows: Sequence[int]) -> SampleTable:
        """Return the table without the samples `rows`."""
        left = np.delete(np.arange(len(self)), np.array(rows, np.int64))
        fewer = copy(self)
        fewer.columns = self.columns.select(left)
        return fewer


def read_manifest(file: Path, *, root: Path | None, num_classes: int | None, labelled: bool) -> SampleTable:
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
    text = clean_text(_read_text(file, "manifest"))
    columns = _without_comments(parse_manifest(text), folder)
    row = _first_fault(columns, num_classes, labelled)
    if row is not None:
        number = int(columns.lines[row])
        line = text.split(b"\n", number)[number - 1].strip(BLANKS)
        raise _fault(f"{file}:{number}", line.decode(), parse_line(line), num_classes, labelled)
    if not len(columns.starts):
        raise DataError(f"{file}: the manifest is empty", allowed=_FORM)
    return SampleTable(folder, columns)


def _without_comments(columns: SampleColumns, folder: Path) -> SampleColumns:
    """Leave out the doubtful samples of which no file exists."""
    table = SampleTable(folder, columns)
    comments = [row for row in columns.doubtful.tolist() if not os.path.exists(table[row].path)]
    return columns.select(np.delete(np.arange(len(table)), comments)) if len(columns.doubtful) else columns


def check_labels(table: SampleTable, source: Path, num_classes: int | None, labelled: bool) -> None:
    """Check the labels of samples that come from elsewhere than a manifest, as `read_manifest` does.

    Raises:
        DataError: if a label is missing or out of range; the error names `source` and the sample.
    """
    row = _first_fault(table.columns, num_classes, labelled)
    if row is not None:
        name = table[row].name
        parsed = ManifestLine(name.encode(), int(table.columns.labels[row]), NO_SPAN)
        raise _fault(str(source), name, parsed, num_classes, labelled)


def _first_fault(columns: SampleColumns, num_classes: int | None, labelled: bool) -> int | None:
    """Return the first sample whose label or span cannot be used, or None."""
    labels, spans = columns.labels, columns.spans
    wrong = (labels < 0) & ((labels != NO_LABEL) | labelled)
    if num_classes is not None:
        wrong |= labels >= num_classes
    if len(spans):
        wrong |= (spans[:, 0] >= spans[:, 1]) & (spans[:, 0] >= 0)
    return int(wrong.argmax()) if wrong.any() else None


def _fault(place: str, line: str, parsed: ManifestLine, num_classes: int | None, labelled: bool) -> DataError:
    """Return the error about a line that `_first_fault` has found."""
    if parsed.label == NOT_TEXT:
        return DataError(
            f"{place}: the line contains a carriage return or a null character",
            given=repr(line),
            fix="end lines with a line feed, and rename files with such names",
        )
    if parsed.label == NOT_A_LABEL:
        fix = "enclose the path in double quotes if it does contain a separator"
        return DataError(f"{place}: no label", given=repr(line), allowed=_FORM, fix=fix)
    if parsed.label == NO_LABEL and labelled:
        return DataError(f"{place}: no label", given=repr(line), allowed=_FORM)
    if NO_LABEL < parsed.label < 0 or (num_classes is not None and parsed.label >= num_classes):
        allowed = "0 or more" if num_classes is None else f"0..{num_classes - 1}"
        return DataError(f"{place}: label out of range", given=parsed.label, allowed=allowed)
    return DataError(
        f"{place}: the span holds no frames",
        given=repr(line),
        allowed="path#FIRST-STOP label, with FIRST below STOP",
    )


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
    # splitlines() would also split at characters that names may contain.
    lines = clean_text(_read_text(file, "list of class names")).decode().split("\n")
    names = [name for line in lines if (name := line.strip(BLANKS.decode()))]
    if not names:
        raise DataError(f"{file}: no class names", allowed="one class name per line, in label order")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{file}: class names are repeated", given=", ".join(twice))
    return names


def names_and_labels(samples: Sequence[Sample]) -> Iterator[tuple[str, int | None]]:
    """Yield the name and label of every sample."""
    if isinstance(samples, SampleTable):
        return samples.names_and_labels()
    return ((sample.name, sample.label) for sample in samples)


def leave_out(samples: Sequence[Sample], rows: Sequence[int]) -> Sequence[Sample]:
    """Return the samples without those at the indices `rows`."""
    if isinstance(samples, SampleTable):
        return samples.without(rows)
    gone = set(rows)
    return [sample for row, sample in enumerate(samples) if row not in gone]


def _read_text(file: Path, kind: str) -> bytes:
    """Return the content of a file of UTF-8 text."""
    if not file.exists():
        raise DataError(f"{file}: no such {kind}")
    if not file.is_file():
        raise DataError(f"{file}: not a {kind}", given="a folder")
    try:
        content = file.read_bytes()
        if not content.isascii():
            content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: the {kind} is not UTF-8 text", given=f"byte {error.start}") from None
    except OSError as error:
        raise DataError(f"{file}: cannot read the {kind}", given=error.strerror) from error
    return content


def _span_text(span: tuple[int, int] | None) -> str:
    return "" if span is None else f"#{span[0]}-{span[1]}"


def _line(sample: Sample, root: Path) -> str:
    path = sample.path
    text = str(path.relative_to(root) if path.is_relative_to(root) else path.absolute())
    if _NOT_IN_A_LINE.search(text):
        raise DataError(f"{text!r}: this path cannot be written to a manifest", fix="rename the file")
    plain = text + _span_text(sample.span) + ("" if sample.label is None else f" {sample.label}")
    label = NO_LABEL if sample.label is None else sample.label
    meant = ManifestLine(text.encode(), label, sample.span or NO_SPAN)
    line = plain.encode()
    special = plain[0] in "#\ufeff" or line != line.strip(BLANKS) or is_header(line)
    if not special and parse_line(line) == meant:
        return plain
    return '"' + text.replace('"', '""') + '"' + plain[len(text) :]
