"""Optimiser states on a disk of the node, between the steps (ZeRO-Infinity)."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

from everest_ds.config import Experiment
from everest_ds.errors import ConfigError

_COMPILED = ("pin_memory", "async_io")  # by DeepSpeed, one after the other
_KILLED_AFTER_S = 600  # without a new file; a single one takes a minute or two


def check_nvme(config: Experiment) -> None:
    """Refuse `parallelism.offload_to_nvme` where this machine cannot do it.

    Raises:
        ConfigError: saying what is missing and how to get it.
    """
    folder = config.parallelism.offload_to_nvme
    if folder is None:
        return
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(
            "parallelism.offload_to_nvme: not a folder that can be written to",
            given=str(folder),
            fix="name a folder on a local disk of every node",
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder  # heavy

    if shutil.which("g++") is None or shutil.which("ninja") is None or not AsyncIOBuilder().is_compatible():
        raise ConfigError(
            "parallelism.offload_to_nvme: DeepSpeed's async_io cannot be built here",
            fix="install libaio with its headers, a C++ compiler and ninja"
            " (Debian: apt-get install libaio-dev g++ ninja-build), or set parallelism.offload_to_cpu=true",
        )
    _refuse_stale_locks()


def _refuse_stale_locks() -> None:
    """PyTorch waits without a word or an end for the lock that a killed compile has left behind."""
    from torch.utils.cpp_extension import _get_build_directory

    for name in _COMPILED:
        folder = Path(_get_build_directory(name, verbose=False))
        silent_s = time.time() - _last_written(folder)
        if (folder / "lock").exists() and silent_s > _KILLED_AFTER_S:
            raise ConfigError(
                f"{folder / 'lock'}: left by a compile that was killed {silent_s / 60:.0f} minutes ago",
                fix="remove this file; every run with parallelism.offload_to_nvme would wait for it",
            )


def _last_written(folder: Path) -> float:
    """When a file of the folder was, or came or went; a compile replaces them meanwhile."""
    times = [folder.stat().st_mtime]
    for file in folder.iterdir():
        with suppress(FileNotFoundError):
            times.append(file.stat().st_mtime)
    return max(times)


def swap_folder(config: Experiment) -> Path | None:
    """Where this run keeps its states: a folder of its own, for several runs may share the disk."""
    parent = config.parallelism.offload_to_nvme
    if parent is None:
        return None
    run = hashlib.sha256(str(config.run.dir.resolve()).encode()).hexdigest()[:12]
    return parent.resolve() / f"everest-ds-{run}"


def remove_swap_files(config: Experiment, rank: int) -> None:
    """Free the disk of what is of no use once the rank is done: checkpoints hold the states."""
    folder = swap_folder(config)
    if folder is not None:
        shutil.rmtree(folder / "zero_stage_3" / "optimizer" / f"rank{rank}", ignore_errors=True)
