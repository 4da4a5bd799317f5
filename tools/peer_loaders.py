"""The original systems' data loaders, run from clones of their repositories, for comparison only.

Missing modules that their files import but pre-training does not use (torchvision, OpenCV, a function that
NumPy has dropped) are replaced by empty modules. All timed code is the original.
"""

from __future__ import annotations

import importlib
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from everest_ds.errors import UsageError

VIDEOMAE = "https://github.com/MCG-NJU/VideoMAE"
_NOT_NEEDED = (
    *("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "cv2"),
    "numpy.lib.function_base",
)


def videomae_loader(
    folder: Path, videos: Sequence[Path], list_file: Path, batch_size: int, num_workers: int
) -> DataLoader[Any]:
    """Build VideoMAE's pre-training loader as its script does: 16 frames at stride 4, 224 pixels.

    Args:
        folder: clone of VideoMAE's repository.
        videos: the samples, one per video, in this order.
        list_file: file to write the samples to, in VideoMAE's format.
        batch_size: clips per batch.
        num_workers: number of worker processes.

    Raises:
        UsageError: `folder` is not a clone of VideoMAE, or a path cannot be written to its list.
    """
    if not (folder / "kinetics.py").is_file():
        raise UsageError(
            f"{folder}: the folder holds no kinetics.py", fix=f"git clone {VIDEOMAE}, and name its folder"
        )
    spaced = [str(video) for video in videos if " " in str(video)]
    if spaced:
        raise UsageError(f"{spaced[0]}: VideoMAE's list format does not support spaces in paths")
    list_file.write_text("".join(f"{video} 0\n" for video in videos))
    with _their_modules(folder):
        datasets = importlib.import_module("datasets")
        settings = Namespace(
            input_size=224,
            mask_type="tube",
            window_size=(8, 14, 14),
            mask_ratio=0.9,
            data_path=str(list_file),
            num_frames=16,
            sampling_rate=4,
        )
        dataset = datasets.build_pretraining_dataset(settings)
    return DataLoader(
        dataset,
        batch_size,
        num_workers=num_workers,
        drop_last=True,
        worker_init_fn=_seed_worker,
        shuffle=True,
    )


def _seed_worker(worker: int) -> None:
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)
    torch.set_num_threads(1)


class _Compose:
    """A replacement for torchvision's Compose, which applies transforms one after the other."""

    def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        for step in self.steps:
            value = step(value)
        return value


class _Empty(ModuleType):
    """A placeholder for a missing module: every name can be imported, but only Compose can be used."""

    def __getattr__(self, name: str) -> Any:
        if name == "Compose":
            return _Compose
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name)


@contextmanager
def _their_modules(folder: Path) -> Iterator[None]:
    """Put the clone on sys.path within the context, and restore sys.modules and sys.path afterwards."""
    before = dict(sys.modules)
    for name in _NOT_NEEDED:
        try:
            importlib.import_module(name)
        except (ImportError, RuntimeError):  # torchvision raises RuntimeError beside another torch build
            sys.modules[name] = _Empty(name)
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)
