"""Files that survive a crash, a full disk and a power cut: written whole or not at all, and read with mercy.

Everything that a restart reads is written here. A file is replaced in one step; a line is appended as one
write. A crash may still cut off a line of an append-only file, anywhere if others append after it, so such
files are read line by line and lines that are damaged are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple


class JsonLines(NamedTuple):
    """The content of a file of JSON objects, one per line.

    Attributes:
        rows: the objects, in the order of the lines.
        num_damaged: number of lines that are not whole JSON objects, and were left out.
    """

    rows: list[dict[str, Any]]
    num_damaged: int


def replace_file(file: Path, content: str | bytes) -> None:
    """Write a file so that, whenever the machine stops, it holds the old or the new content, whole.

    Raises:
        OSError: if the file cannot be written; the old content is then still there.
    """
    with replacing(file) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(file: Path) -> Iterator[BinaryIO]:
    """Open a stream whose content replaces that of `file` when the block ends, like `replace_file`."""
    # The name is unique, because several processes may replace the file at once; one of them wins.
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def replace_json(file: Path, value: object) -> None:
    """Write `value` as JSON, like `replace_file`."""
    replace_file(file, json.dumps(value, indent=2) + "\n")


def replace_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a file of JSON objects, one per line, like `replace_file`."""
    replace_file(file, "".join(f"{json.dumps(row)}\n" for row in rows))


def append_row(file: Path, row: dict[str, Any]) -> None:
    """Append a JSON object as one line and one write, so that lines of several processes do not mix.

    If the last line was cut off, the new one still begins at the start of a line.

    Raises:
        OSError: if the line could not be written whole.
    """
    line = json.dumps(row).encode() + b"\n"
    with open(file, "ab+", buffering=0) as stream:
        end = stream.seek(0, os.SEEK_END)
        if end and (stream.seek(end - 1), stream.read(1))[1] != b"\n":
            line = b"\n" + line
        if stream.write(line) != len(line):  # the disk became full in the middle of the line
            raise OSError(f"{file}: the disk is full; a line was cut off")


def read_json_rows(file: Path) -> JsonLines:
    """Read a file of JSON objects, one per line; a missing file has none.

    Raises:
        OSError: if the file exists but cannot be read.
    """
    found = list(iterate_json_rows(file))
    rows = [row for row in found if row is not None]
    return JsonLines(rows, len(found) - len(rows))


def iterate_json_rows(file: Path) -> Iterator[dict[str, Any] | None]:
    """Yield the rows of a file like `read_json_rows`, one at a time, and None for a damaged line."""
    try:
        stream = open(file, "rb")
    except FileNotFoundError:
        return
    with stream:
        yield from parse_json_rows(stream)


def parse_json_rows(lines: Iterable[bytes]) -> Iterator[dict[str, Any] | None]:
    """Yield the JSON object of each line that is not empty, and None for a damaged line."""
    for line in filter(bytes.strip, lines):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        yield row if isinstance(row, dict) else None
