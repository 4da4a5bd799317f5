"""The lines of a manifest: parsing of one line and of a whole text, and writing of a line.

A long text is parsed once and kept in the user's cache folder, as compact arrays. The name of that file is a
digest of the text, so that a changed manifest never meets an old file. It can be removed at any time.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from array import array
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from everest_ds.cache import cache_folder
from everest_ds.data.video_files import VIDEO_SUFFIXES
from everest_ds.durable_files import replacing

BLANKS = b" \t\r"
NO_LABEL = int(np.iinfo(np.int64).min)
NOT_A_LABEL = NO_LABEL + 1  # a path is followed by text that is not a whole number
NOT_TEXT = NO_LABEL + 2  # a line contains a carriage return or a null character
NO_SPAN = (-1, -1)

_SUFFIXES = tuple(suffix.encode() for suffix in VIDEO_SUFFIXES)
_DIGITS = b"0123456789"
_MOST_DIGITS = 18  # of a label, so that it fits into 64 bits
_SPAN = re.compile(rb"(.+)#([0-9]{1,12})-([0-9]{1,12})", re.DOTALL)
_QUOTED_LABEL = re.compile(
    rb'("[^"]*(?:""[^"]*)*"(?:#[0-9]{1,12}-[0-9]{1,12})?(?:[ \t]*[,;][ \t]*|[ \t]+))"(-?[0-9]{1,18})"'
)
_PATHS = rb"(?:path|file|file_?name|file_?path|video|video_?path|video_?name|name|clip)"
_LABELS = rb"(?:label|label_?id|class|class_?id|class_?index|target)"
# Quotes are around whole names: a quoted line is a video of that name.
_HEADER = re.compile(
    rb"(?i)(?:%b|\"%b\")[ \t]*[,; \t][ \t]*(?:%b|\"%b\")" % (_PATHS, _PATHS, _LABELS, _LABELS)
)
_BEFORE_TEXT = re.compile(rb"(?i)\.(?:" + rb"|".join(s[1:] for s in _SUFFIXES) + rb")[ \t]*[,; \t]")
_MARK = b"\xef\xbb\xbf"  # the byte order mark
_WORTH_KEEPING_BYTES = 1 << 20  # a shorter text is parsed in less time than its file in the cache is found
_NUM_KEPT = 8


class ManifestLine(NamedTuple):
    """The content of a line: path, label (or `NO_LABEL` and the like) and span of frames (or `NO_SPAN`)."""

    path: bytes
    label: int
    span: tuple[int, int]


class SampleColumns(NamedTuple):
    """The samples of a manifest as arrays.

    Attributes:
        names: uint8, the paths of all samples, one after the other, in UTF-8 and without needless dots.
        starts, stops: int64, the part of `names` that belongs to each sample.
        labels: int64, as in `ManifestLine`.
        spans: int64 (samples, 2), as in `ManifestLine`; (0, 2) if no sample has a span.
        lines: int32, the number of each sample's line, from 1.
        doubtful: int64, the samples whose line is a comment unless a file of that name exists.
    """

    names: NDArray[np.uint8]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    labels: NDArray[np.int64]
    spans: NDArray[np.int64]
    lines: NDArray[np.int32]
    doubtful: NDArray[np.int64]

    def select(self, rows: NDArray[np.int64] | slice) -> SampleColumns:
        """Return the columns of some samples, none of them doubtful."""
        starts, stops, labels = self.starts[rows], self.stops[rows], self.labels[rows]
        spans = self.spans[rows] if len(self.spans) else self.spans
        return SampleColumns(self.names, starts, stops, labels, spans, self.lines[rows], self.doubtful[:0])


def parse_line(line: bytes) -> ManifestLine:
    """Parse a line without blanks at its ends: the label and the span are its last fields, if it has them."""
    if b"\r" in line or b"\0" in line:
        return ManifestLine(line, NOT_TEXT, NO_SPAN)
    if line.endswith(b'"') and (csv := _QUOTED_LABEL.fullmatch(line)):
        line = b"".join(csv.groups())
    path, label = _split_label(line)
    match = _SPAN.fullmatch(path) if b"#" in path else None
    span = (int(match[2]), int(match[3])) if match else NO_SPAN
    path = match[1] if match else path
    if path.startswith(b'"') and path.endswith(b'"') and b'"' not in path[1:-1].replace(b'""', b""):
        return ManifestLine(path[1:-1].replace(b'""', b'"') or path, label, span)
    if label == NO_LABEL and not path.lower().endswith(_SUFFIXES) and _BEFORE_TEXT.search(path):
        label = NOT_A_LABEL
    return ManifestLine(path, label, span)


def _split_label(line: bytes) -> tuple[bytes, int]:
    """Split a label and its separator off the end of a line."""
    before = line.rstrip(_DIGITS)
    if not 0 < len(line) - len(before) <= _MOST_DIGITS:
        return line, NO_LABEL
    before = before.removesuffix(b"-")
    path = before.rstrip(b" \t")
    if path.endswith((b",", b";")) and len(path) > 1:
        path = path[:-1].rstrip(b" \t")
    if not path or len(path) == len(before):
        return line, NO_LABEL
    return path, int(line[len(before) :])


def parse_manifest(text: bytes) -> SampleColumns:
    """Parse the text of a manifest, or read the result of an earlier call from the cache folder."""
    if len(text) < _WORTH_KEEPING_BYTES:
        return _parse(text)
    # A digest of this module is the key, so that other versions of it do not read what this one has kept.
    version = hashlib.blake2b(Path(__file__).read_bytes(), digest_size=16).digest()
    digest = hashlib.blake2b(text, digest_size=16, key=version).hexdigest()
    file = cache_folder() / "manifests" / f"{digest}.npz"
    with suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(file) as arrays:
        return SampleColumns(**arrays)
    columns = _parse(text)
    with suppress(OSError):  # a cache folder that is full or read-only costs time only
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.savez(stream, **columns._asdict())
        newest = sorted(file.parent.glob("*.npz"), key=lambda other: other.stat().st_mtime_ns)
        for other in newest[:-_NUM_KEPT]:
            other.unlink()
    return columns


def _parse(text: bytes) -> SampleColumns:
    names, lines, spans = bytearray(), array("i"), array("q")
    starts, labels, doubtful = array("q"), array("q"), array("q")
    for number, line in enumerate(io.BytesIO(text), start=1):
        line = line.strip(BLANKS + b"\n")
        comment = line.startswith(b"#")
        if not line or (not starts and is_header(line)):
            continue
        path, label, span = parse_line(line)
        if comment:
            if not path.lower().endswith(_SUFFIXES):
                continue
            doubtful.append(len(starts))
        starts.append(len(names))
        names += _without_dots(path)
        labels.append(label)
        spans.extend(span)
        lines.append(number)
    stops = np.append(np.array(starts[1:], np.int64), len(names))[: len(starts)]
    return SampleColumns(
        np.frombuffer(names, np.uint8),
        np.array(starts, np.int64),
        stops,
        np.array(labels, np.int64),
        np.array(spans if max(spans, default=-1) >= 0 else [], np.int64).reshape(-1, 2),
        np.array(lines, np.int32),
        np.array(doubtful, np.int64),
    )


def is_header(line: bytes) -> bool:
    """Return whether a line names the columns of a table, as in `path,label`."""
    return _HEADER.fullmatch(line) is not None


def _without_dots(path: bytes) -> bytes:
    """Return a path as `pathlib` writes it, except that `.` is empty."""
    if b"//" in path or b"./" in path or path.endswith((b"/", b"/.")) or path == b".":
        path = str(PurePosixPath(path.decode())).encode()
        return b"" if path == b"." else path
    return path


def clean_text(text: bytes) -> bytes:
    """Return a text with Unix line ends and without byte order marks, which joined files have within."""
    text = text if b"\n" in text else text.replace(b"\r", b"\n")
    return text.removeprefix(_MARK).replace(b"\n" + _MARK, b"\n")
