"""Offload of optimiser states to a local disk of the node between steps (ZeRO-Infinity)."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from everest_ds.config import Experiment
from everest_ds.errors import ConfigError
from everest_ds.parallel.deepspeed_internals import can_build_async_io, swap_folder_of_rank

_COMPILED = ("pin_memory", "async_io")  # extensions that DeepSpeed compiles, one after the other
# A compilation that writes no file for this long was killed: compiling one file takes a minute or two.
_KILLED_AFTER_S = 600


def check_nvme(config: Experiment) -> None:
    """Refuse `parallelism.offload_to_nvme` if this machine does not support it.

    Raises:
        ConfigError: naming what is missing and how to install it.
    """
    folder = config.parallelism.offload_to_nvme
    if folder is None:
        return
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            "parallelism.offload_to_nvme is not a writable folder",
            given=str(folder),
            fix="name a folder on a local disk of every node",
        )
    if shutil.which("g++") is None or shutil.which("ninja") is None or not can_build_async_io():
        raise ConfigError(
            "parallelism.offload_to_nvme: DeepSpeed's async_io cannot be built on this machine",
            fix="install libaio with its headers, a C++ compiler and ninja"
            " (Debian: apt-get install libaio-dev g++ ninja-build), or set parallelism.offload_to_cpu=true",
        )
    _refuse_stale_locks()


def _refuse_stale_locks() -> None:
    """Refuse to start if a killed compilation left its lock behind: PyTorch would wait for it forever."""
    from torch.utils.cpp_extension import _get_build_directory

    for name in _COMPILED:
        folder = Path(_get_build_directory(name, verbose=False))
        silent_s = time.time() - _last_written(folder)
        if (folder / "lock").exists() and silent_s > _KILLED_AFTER_S:
            raise ConfigError(
                f"{folder / 'lock'}: lock of a compilation that was killed {silent_s / 60:.0f} minutes ago",
                fix="remove this file; every run with parallelism.offload_to_nvme would wait for it",
            )


def _last_written(folder: Path) -> float:
    """Return the time of the last change in `folder`, in seconds since the epoch."""
    times = [folder.stat().st_mtime]
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # a running compilation replaces files
            times.append(file.stat().st_mtime)
    return max(times)


def swap_folder(config: Experiment) -> Path | None:
    """Return the folder for this run's offloaded states, or None without offload to NVMe.

    Each run has its own folder, because several runs may share the disk.
    """
    parent = config.parallelism.offload_to_nvme
    if parent is None:
        return None
    run = hashlib.sha256(str(config.run.dir.resolve()).encode()).hexdigest()[:12]
    return parent.resolve() / f"everest-ds-{run}"


def remove_swap_files(config: Experiment, rank: int) -> None:
    """Remove the offloaded states of `rank` from the disk at the end of a run; checkpoints keep them."""
    folder = swap_folder(config)
    if folder is not None:
        shutil.rmtree(swap_folder_of_rank(folder, rank), ignore_errors=True)
