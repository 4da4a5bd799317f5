"""Data sets of clips: random ones for training, fixed views for evaluation; and their loaders.

A clip is a uint8 tensor (frame, row, column, colour); nothing here is floating point.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from everest_ds.config import BatchPlan, Experiment
from everest_ds.data.decode import open_sample
from everest_ds.data.frames import train_frames, view_frames
from everest_ds.data.manifest import Sample
from everest_ds.data.order import Visit, evaluation_batches, sample_key, training_visits
from everest_ds.data.transforms import crop_resize, train_box, view_box
from everest_ds.errors import DataError, EverestError

T = TypeVar("T")


# A view is the same in every evaluation of every run, what is drawn for it included.
_VIEW_SEED = 0


class ClipBatch(NamedTuple):
    """A batch on its way to a model.

    Attributes:
        clip: uint8 (B, F, H, W, 3).
        label: int64 (B,); -1 where the manifest has none.
        key: int64 (B,), the random keys of the clips.
        item: int64 (B,), which sample (training) or which view (evaluation) this is.
    """

    clip: Tensor
    label: Tensor
    key: Tensor
    item: Tensor

    def to(self, device: torch.device) -> ClipBatch:
        """The batch on `device`, copied without waiting where the memory is pinned."""
        return ClipBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class View(NamedTuple):
    """One of the looks that multi-view evaluation takes at a sample."""

    sample: int
    segment: int
    crop: int


class TrainingClips(Dataset[ClipBatch]):
    """Random clips; what is random follows from (seed, epoch, sample)."""

    def __init__(self, samples: Sequence[Sample], config: Experiment) -> None:
        self.samples = samples
        self.geometry = config.candidate_geometry
        self.data = config.data
        self.seed = config.run.seed

    def __getitem__(self, visit: Visit) -> ClipBatch:
        sample = self.samples[visit.sample]
        key = sample_key(self.seed, visit.epoch, visit.sample)
        rng = np.random.default_rng(key)
        data = self.data
        with open_sample(sample, data) as video, _about(sample):
            frames = train_frames(
                video.num_frames, self.geometry.num_frames, data.frame_stride, data.sampling, rng
            )
            clip = video.read(frames)
        box = train_box(clip.shape[1], clip.shape[2], data.train_crop, rng)
        flip = data.horizontal_flip and rng.random() < 0.5
        return _item(crop_resize(clip, box, self.geometry.image_size, flip), sample, key, visit.sample)


class EvaluationClips(Dataset[ClipBatch]):
    """Every view of every sample: `segments` places in time times `crops` places in space."""

    def __init__(self, samples: Sequence[Sample], config: Experiment, segments: int, crops: int) -> None:
        self.samples = samples
        self.geometry = config.candidate_geometry
        self.data = config.data
        self.segments = segments
        self.crops = crops
        self.views = [
            View(i, s, c) for i in range(len(samples)) for s in range(segments) for c in range(crops)
        ]

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, item: int) -> ClipBatch:
        view = self.views[item]
        sample = self.samples[view.sample]
        with open_sample(sample, self.data) as video, _about(sample):
            frames = view_frames(
                video.num_frames,
                self.geometry.num_frames,
                self.data.frame_stride,
                self.data.sampling,
                view.segment,
                self.segments,
            )
            clip = video.read(frames)
        box = view_box(clip.shape[1], clip.shape[2], view.crop, self.crops)
        key = sample_key(_VIEW_SEED, 0, item)
        return _item(crop_resize(clip, box, self.geometry.image_size), sample, key, item)


def training_batches(
    samples: Sequence[Sample],
    config: Experiment,
    plan: BatchPlan,
    rank: int,
    steps: range,
    pin_memory: bool,
) -> Iterator[ClipBatch]:
    """This rank's micro-batches for the given optimiser steps, across epochs, decoded ahead of use."""
    visits = training_visits(len(samples), plan, config.run.seed, rank, steps.start, steps.stop)
    return _load(TrainingClips(samples, config), visits, config.data.num_workers, pin_memory)


def evaluation_views(
    clips: EvaluationClips, batch_size: int, rank: int, num_ranks: int, pin_memory: bool
) -> Iterator[ClipBatch]:
    """This rank's share of the views; see `evaluation_batches`."""
    batches = evaluation_batches(len(clips), batch_size, rank, num_ranks)
    return _load(clips, iter(batches), clips.data.num_workers, pin_memory)


class _about:  # noqa: N801 - reads as a preposition in a `with`
    """Name the sample's file in errors that do not know it."""

    def __init__(self, sample: Sample) -> None:
        self.path = str(sample.path)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DataError) and self.path not in str(error):
            raise DataError(f"{self.path}: {error}") from None


def _item(clip: Tensor, sample: Sample, key: int, item: int) -> ClipBatch:
    label = -1 if sample.label is None else sample.label
    return ClipBatch(clip, torch.tensor(label), torch.tensor(key), torch.tensor(item))


class _Reporting(Dataset[object]):
    """Hands a typed error over as a value: raised inside a worker it would arrive as a traceback's text."""

    def __init__(self, clips: Dataset[ClipBatch]) -> None:
        self.clips = clips

    def __getitem__(self, item: object) -> ClipBatch | EverestError:
        try:
            return self.clips[item]
        except EverestError as error:
            return error


def _collate(items: list[ClipBatch | EverestError]) -> ClipBatch | EverestError:
    for item in items:
        if isinstance(item, EverestError):
            return item
    batch: ClipBatch = default_collate(items)
    return batch


def _load(
    clips: Dataset[ClipBatch], batches: Iterator[list[T]], num_workers: int, pin_memory: bool
) -> Iterator[ClipBatch]:
    loader = DataLoader(
        _Reporting(clips),
        batch_sampler=batches,
        collate_fn=_collate,
        num_workers=num_workers,
        worker_init_fn=_start_worker,
        # Children of the rank itself: they see it die, and end. Python's own default differs by version.
        multiprocessing_context="fork" if num_workers else None,
        pin_memory=pin_memory,
        prefetch_factor=4 if num_workers else None,
    )
    for batch in loader:
        if isinstance(batch, EverestError):
            raise batch
        yield batch


def _start_worker(worker: int) -> None:
    # A worker inherits the rank's handlers: it must neither save a checkpoint nor outlive a Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
