"""The folder of a run's checkpoints: which are complete, how one becomes so, and which may go.

A checkpoint is written under a hidden name and renamed when everything in it is on the disk. Nothing that can
be read under its real name is ever changed; what has to go is first renamed out of sight.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from everest_ds.checkpoints.manifest import Manifest, read_manifest, write_manifest
from everest_ds.checkpoints.names import checkpoint_path, list_checkpoints, step_of
from everest_ds.checkpoints.tensor_file import seal_of, sync_folder
from everest_ds.errors import CheckpointError

_SAVING, _DELETING, _DAMAGED = ".saving-", ".deleting-", "damaged-"


def damage(path: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """What is wrong with those files of a checkpoint, or None."""
    for name in names:
        try:
            if (path / name).stat().st_size != manifest.files[name].num_bytes:
                return f"{name} has {(path / name).stat().st_size} of {manifest.files[name].num_bytes} bytes"
            if seal_of(path / name) != manifest.files[name]:
                return f"{name} is not what was written: its checksum differs"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} is not readable: {error.strerror}"
    return None


def verify(path: Path) -> Manifest:
    """Read every byte of a checkpoint; its manifest.

    Raises:
        CheckpointError: saying what is missing or damaged.
    """
    manifest = read_manifest(path)
    problem = damage(path, manifest, manifest.files)
    if problem is not None:
        raise CheckpointError(f"{path}: damaged", given=problem, fix="use another checkpoint of the run")
    return manifest


def find_checkpoint(source: Path) -> tuple[Path, Manifest]:
    """The checkpoint at a path: itself, or the newest complete one of a run folder. All of it is verified.

    Raises:
        CheckpointError: if there is none, or only damaged ones.
    """
    found = list_checkpoints(source / "checkpoints")
    if not found:
        return source, verify(source)
    problems = []
    for path in reversed(found):
        try:
            return path, verify(path)
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError(f"{source}: no complete checkpoint", given=problems[0])


def start_saving(folder: Path, step: int) -> Path:
    """An empty hidden folder to write into; what a crash left of earlier ones is removed."""
    for leftover in (*folder.glob(f"{_SAVING}*"), *folder.glob(f"{_DELETING}*")):
        shutil.rmtree(leftover)
    saving = folder / f"{_SAVING}{checkpoint_path(folder, step).name}"
    saving.mkdir(parents=True)
    return saving


def abandon_saving(saving: Path) -> None:
    """Free the space of a checkpoint that could not be written."""
    shutil.rmtree(saving, ignore_errors=True)


def commit(saving: Path, manifest: Manifest) -> Path:
    """Make a written checkpoint visible, all at once; its path from now on.

    Every file but the manifest must be in `saving` and on the disk.
    """
    write_manifest(saving, manifest)
    sync_folder(saving)
    path = checkpoint_path(saving.parent, manifest.facts.step)
    if path.exists():  # a damaged one: a complete one would have been resumed from
        _delete(path)
    os.rename(saving, path)
    sync_folder(path.parent)
    return path


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that it is neither resumed from nor counted; its new path."""
    aside = path.with_name(f"{_DAMAGED}{path.name}")
    if aside.exists():
        _delete(aside)
    os.rename(path, aside)
    return aside


def prune(folder: Path, keep: int, keep_every_steps: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and those at multiples of `keep_every_steps`."""
    for path in list_checkpoints(folder)[:-keep]:
        if keep_every_steps is None or step_of(path) % keep_every_steps:
            _delete(path)


def _delete(path: Path) -> None:
    hidden = path.with_name(f"{_DELETING}{path.name}")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)
