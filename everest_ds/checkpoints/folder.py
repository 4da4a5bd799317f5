"""The folder of a run's checkpoints: verifying, committing and deleting them.

A checkpoint is written under a hidden name and renamed when all of its files are on the disk. A checkpoint
under its real name is never modified; to be deleted, it is first renamed to a hidden name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from everest_ds.checkpoints.names import checkpoint_path, list_checkpoints, step_of
from everest_ds.checkpoints.sealed_manifest import (
    Manifest,
    read_checkpoint_manifest,
    write_checkpoint_manifest,
)
from everest_ds.checkpoints.tensor_file import seal_of, sync_folder
from everest_ds.errors import CheckpointError

_SAVING, _DELETING, _DAMAGED = ".saving-", ".deleting-", "damaged-"


def damage(path: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """Return a description of the first damage in the named files of a checkpoint, or None."""
    for name in names:
        try:
            if (path / name).stat().st_size != manifest.files[name].num_bytes:
                return f"{name} has {(path / name).stat().st_size} of {manifest.files[name].num_bytes} bytes"
            if seal_of(path / name) != manifest.files[name]:
                return f"{name} has changed since it was written: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} is not readable: {error.strerror}"
    return None


def verify_checkpoint(path: Path) -> Manifest:
    """Verify every byte of a checkpoint, and return its manifest.

    Raises:
        CheckpointError: if a file is missing or damaged; the message names it.
    """
    manifest = read_checkpoint_manifest(path)
    problem = damage(path, manifest, manifest.files)
    if problem is not None:
        raise CheckpointError(f"{path}: damaged", given=problem, fix="use another checkpoint of the run")
    return manifest


def find_checkpoint(source: Path) -> tuple[Path, Manifest]:
    """Find and verify a checkpoint: `source` itself, or the newest complete checkpoint of a run folder.

    Raises:
        CheckpointError: if there is no checkpoint, or only damaged checkpoints.
    """
    found = list_checkpoints(source / "checkpoints")
    if not found:
        return source, verify_checkpoint(source)
    problems = []
    for path in reversed(found):
        try:
            return path, verify_checkpoint(path)
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(f"{source}: no complete checkpoint", given=problems[0])


def start_saving(folder: Path, step: int) -> Path:
    """Create a hidden folder for a new checkpoint, and remove such folders left by a crash.

    What cannot be removed, such as a file that NFS keeps open, stays: a checkpoint consists of the files
    that its manifest names.
    """
    for leftover in (*folder.glob(f"{_SAVING}*"), *folder.glob(f"{_DELETING}*")):
        _remove(leftover)
    saving = folder / f"{_SAVING}{checkpoint_path(folder, step).name}"
    saving.mkdir(parents=True, exist_ok=True)
    return saving


def abandon_saving(saving: Path) -> None:
    """Delete the hidden folder of a checkpoint that could not be written, to free its space."""
    _remove(saving)


def commit(saving: Path, manifest: Manifest) -> Path:
    """Make a written checkpoint visible in one atomic step, and return its path.

    All files except the manifest must be in `saving` and flushed to the disk.
    """
    write_checkpoint_manifest(saving, manifest)
    sync_folder(saving)
    path = checkpoint_path(saving.parent, manifest.facts.step)
    if path.exists():  # a damaged checkpoint: the run would have resumed from a complete one
        _delete(path)
    os.rename(saving, path)
    sync_folder(path.parent)
    return path


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither resumed from nor counted; return its new path."""
    aside = path.with_name(f"{_DAMAGED}{path.name}")
    if aside.exists():
        _delete(aside)
    os.rename(path, aside)
    return aside


def prune(folder: Path, keep: int, keep_every_steps: int | None) -> None:
    """Delete all checkpoints except the newest `keep` and those at multiples of `keep_every_steps`."""
    for path in list_checkpoints(folder)[:-keep]:
        if keep_every_steps is None or step_of(path) % keep_every_steps:
            _delete(path)


def _delete(path: Path) -> None:
    hidden = path.with_name(f"{_DELETING}{path.name}")
    os.rename(path, hidden)
    _remove(hidden)


def _remove(path: Path) -> None:
    """Remove a folder as far as possible; of a checkpoint that a user replaced by a link, only the link."""
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
