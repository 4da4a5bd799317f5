"""Paths of the files that a command writes into the folder that its user chose."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from everest_ds.errors import UsageError


def output_below(folder: Path, place: Path, inputs: Collection[Path]) -> Path:
    """Return the path of the output file `place` below `folder`, proven to be neither elsewhere nor an input.

    Links are followed, because a folder below `folder` may be a link to the inputs.

    Args:
        folder: the folder that the user chose.
        place: path of the file relative to `folder`.
        inputs: the files that the command reads, resolved.

    Raises:
        UsageError: if the file would lie outside `folder`, or overwrite an input.
    """
    target = folder / place
    resolved = target.resolve()
    if not resolved.is_relative_to(folder.resolve()):
        raise UsageError(
            f"{target}: this file would be written outside {folder}",
            given=resolved,
            fix="choose an output folder without links to other folders",
        )
    refuse_input(target, inputs)
    return target


def refuse_input(file: Path, inputs: Collection[Path]) -> None:
    """Check that the output `file`, which the user named, is none of the `inputs`, given as resolved paths.

    Raises:
        UsageError: if it is one of them.
    """
    if file.resolve() in inputs:
        raise UsageError(
            f"{file}: an input would be overwritten", fix="choose another file or folder to write"
        )
