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
    if resolved in inputs:
        raise UsageError(f"{target}: an input would be overwritten", fix="choose another output folder")
    return target
