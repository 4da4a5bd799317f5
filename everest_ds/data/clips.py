"""Data sets of clips: random ones for training, fixed views for evaluation.

A clip is a uint8 tensor (frame, row, column, colour); nothing here is floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from everest_ds.config import BatchPlan, Experiment
from everest_ds.data.frames import ClipFrames
from everest_ds.data.loader import Loaded, load
from everest_ds.data.manifest import Sample
from everest_ds.data.order import Visit, evaluation_batches, sample_key, stand_ins, training_visits
from everest_ds.data.reading import Failure, SampleReader
from everest_ds.data.transforms import crop_resize, train_box, view_box
from everest_ds.errors import DataError

# A clip (F, H, W, 3) to the tubelets (K, P) that are kept of it, and which tokens they are (K,).
Pack = Callable[[Tensor], tuple[Tensor, Tensor]]
# A view is the same in every evaluation of every run, what is drawn for it included.
_VIEW_SEED = 0
# Beside a clip's key: what is drawn in space is not what is drawn in time.
_SPACE = 1
MISSING = -1  # `ClipBatch.item` of a view whose video cannot be read


class ClipBatch(NamedTuple):
    """A batch on its way to a model.

    Attributes:
        clip: uint8 (B, F, H, W, 3).
        label: int64 (B,), -1 where the manifest has none; float32 (B, classes) once clips were mixed.
        key: int64 (B,), the random keys of the clips.
        item: int64 (B,), which sample (training) or which view (evaluation) this is.
    """

    clip: Tensor
    label: Tensor
    key: Tensor
    item: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What a model is called with."""
        return self.clip, self.key

    def padded(self, size: int) -> ClipBatch:
        """The batch with `size` clips: the last one again as often as it takes, marked as `MISSING`."""
        lack = size - len(self.item)
        if lack <= 0:
            return self
        longer = ClipBatch(*(torch.cat([t, t[-1:].expand(lack, *t.shape[1:])]) for t in self))
        longer.item[-lack:] = MISSING
        return longer

    def to(self, device: torch.device) -> ClipBatch:
        """The batch on `device`, copied without waiting where the memory is pinned."""
        return ClipBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class PackedBatch(NamedTuple):
    """A batch of which the loader's workers chose the tokens.

    Attributes:
        clip: uint8 (B, K, P), the kept tubelets; once unpacked (B, F, H, W, 3).
        label, key, item: as those of a `ClipBatch`.
        kept: int32 (B, K), which tokens those are, ascending.
    """

    clip: Tensor
    label: Tensor
    key: Tensor
    item: Tensor
    kept: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """What a model is called with."""
        return self.clip, self.key, self.kept

    def to(self, device: torch.device) -> PackedBatch:
        """As that of a `ClipBatch`."""
        return PackedBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


Batch = ClipBatch | PackedBatch


class View(NamedTuple):
    """One of the looks that multi-view evaluation takes at a sample."""

    sample: int
    segment: int
    crop: int


class TrainingClips:
    """Random clips, `data.repeats` of a sample; what is random follows from (seed, epoch, sample)."""

    def __init__(self, samples: Sequence[Sample], config: Experiment, pack: Pack | None = None) -> None:
        self.reader = SampleReader(samples, config.data)
        self.samples = samples
        self.geometry = config.candidate_geometry
        self.frames = ClipFrames.of(self.geometry.num_frames, config.data)
        self.data = config.data
        self.seed = config.run.seed
        self.pack = pack

    def __getitem__(self, visit: Visit) -> Loaded:
        """The clips of a visit: of its sample, or where that cannot be read of the first stand-in that can.

        Raises:
            DataError: none can.
        """
        failures: list[Failure] = []
        others = stand_ins(self.seed, visit.epoch, visit.sample, len(self.samples))
        for candidate in chain([visit.sample], others):
            try:
                frames = self.reader.read(candidate, partial(self.choose, visit))
            except DataError as error:
                failures.append(Failure.of(error, epoch=visit.epoch, slot=visit.sample, sample=candidate))
            else:
                return Loaded(self.crops(frames, visit, candidate), failures)
        raise DataError(
            f"{self.samples[visit.sample].name}: cannot be read, nor {len(failures) - 1} others in its place",
            given=failures[0].reason,
            fix="check the storage; `everest-ds data check` lists all such files",
        )

    def name_of(self, visit: Visit) -> str:
        """The sample that a visit is to read, for messages."""
        return self.samples[visit.sample].name

    def choose(self, visit: Visit, video_frames: int) -> list[int]:
        """Which frames of a video of so many a visit takes."""
        rng = np.random.default_rng(sample_key(self.seed, *visit))
        return self.frames.for_training(video_frames, rng)

    def crops(self, frames: Tensor, visit: Visit, sample: int) -> list[Batch]:
        """The visit's clips out of decoded frames (F, H, W, 3) of `sample`."""
        return [self._clip(frames, visit, sample, repeat) for repeat in range(self.data.repeats)]

    def _clip(self, frames: Tensor, visit: Visit, sample: int, repeat: int) -> Batch:
        key = sample_key(self.seed, *visit, repeat)
        rng = np.random.default_rng((key, _SPACE))
        box = train_box(frames.shape[1], frames.shape[2], self.data.train_crop, rng)
        flip = self.data.horizontal_flip and rng.random() < 0.5
        clip = crop_resize(frames, box, self.geometry.image_size, flip)
        single = _single(clip, self.samples[sample].label, key, sample)
        if self.pack is None:
            return single
        tubelets, kept = self.pack(clip)
        return PackedBatch(tubelets, *single[1:], kept)


class EvaluationClips:
    """Every view of every sample: `segments` places in time times `crops` places in space.

    A view that cannot be read is black and says so (`MISSING`): nothing takes its place, and the ranks still
    compute as many batches.
    """

    def __init__(self, samples: Sequence[Sample], config: Experiment, segments: int, crops: int) -> None:
        self.reader = SampleReader(samples, config.data)
        self.samples = samples
        self.geometry = config.candidate_geometry
        self.frames = ClipFrames.of(self.geometry.num_frames, config.data)
        self.data = config.data
        self.segments = segments
        self.crops = crops
        self.views = [
            View(i, s, c) for i in range(len(samples)) for s in range(segments) for c in range(crops)
        ]

    def __len__(self) -> int:
        return len(self.views)

    def sample_of(self, item: int) -> int:
        """Whose view it is."""
        return self.views[item].sample

    def name_of(self, items: Sequence[int]) -> str:
        """The sample that these views are of, for messages."""
        return self.samples[self.sample_of(items[0])].name

    def __getitem__(self, items: Sequence[int]) -> Loaded:
        """Views of one sample: it is opened once, and what several crops look at is decoded once."""
        views = [self.views[item] for item in items]
        sample, segments = views[0].sample, sorted({view.segment for view in views})
        try:
            frames = self.reader.read(sample, partial(self._choose, segments))
        except DataError as error:
            failure = Failure.of(error, epoch=0, slot=sample, sample=sample)
            return Loaded([self._missing(item) for item in items], [failure])
        by_segment = dict(zip(segments, frames.split(self.geometry.num_frames), strict=True))
        return Loaded([self._clip(by_segment[self.views[i].segment], i) for i in items], [])

    def check_complete(self, seen: Collection[int], missing: Collection[int]) -> None:
        """Refuse results that lack a view of a sample that could be read.

        Args:
            seen: the views that a model has seen.
            missing: the samples that could not be read.

        Raises:
            DataError: naming samples that are neither seen nor missing.
        """
        unseen = {view.sample for item, view in enumerate(self.views) if item not in seen}
        lost = sorted(unseen - set(missing))
        if lost:
            raise DataError(
                "views of some videos never came, though they could be read",
                given=f"{len(lost)} of {len(self.samples)} videos, the first {self.samples[lost[0]].name}",
                fix="run the same command again; if it repeats, report it with the logs",
            )

    def _choose(self, segments: Sequence[int], video_frames: int) -> list[int]:
        views = [self.frames.for_view(video_frames, segment, self.segments) for segment in segments]
        return list(chain.from_iterable(views))

    def _clip(self, frames: Tensor, item: int) -> ClipBatch:
        box = view_box(frames.shape[1], frames.shape[2], self.views[item].crop, self.crops)
        return self._single(crop_resize(frames, box, self.geometry.image_size), item, item)

    def _missing(self, item: int) -> ClipBatch:
        side = self.geometry.image_size
        black = torch.zeros(self.geometry.num_frames, side, side, 3, dtype=torch.uint8)
        return self._single(black, item, MISSING)

    def _single(self, clip: Tensor, view: int, item: int) -> ClipBatch:
        label = self.samples[self.views[view].sample].label
        return _single(clip, label, sample_key(_VIEW_SEED, 0, view), item)


def training_batches(
    samples: Sequence[Sample],
    config: Experiment,
    plan: BatchPlan,
    rank: int,
    steps: range,
    pin_memory: bool,
    on_failure: Callable[[Failure], None],
    pack: Pack | None = None,
) -> Iterator[Any]:
    """This rank's micro-batches for the given optimiser steps, across epochs, decoded ahead of use.

    Args:
        pack: called in the workers on each clip: the batches are then `PackedBatch`, else `ClipBatch`.
        on_failure: told of each sample that could not be read, when the batch that it is missing from comes.
    """
    visits = training_visits(len(samples), plan, config.run.seed, rank, steps.start, steps.stop)
    return load(TrainingClips(samples, config, pack), visits, config.data, pin_memory, on_failure)


def evaluation_views(
    clips: EvaluationClips,
    batch_size: int,
    rank: int,
    num_ranks: int,
    pin_memory: bool,
    on_failure: Callable[[Failure], None],
) -> Iterator[ClipBatch]:
    """This rank's share of the views, in batches of one size of at most `batch_size`.

    Batches are as even as possible, and short ones are padded: kernels are chosen, and models compiled, for
    one shape. See `evaluation_batches`.
    """
    num_batches = -(-len(clips) // batch_size)
    size = -(-len(clips) // num_batches) if num_batches else batch_size
    batches = evaluation_batches(len(clips), size, rank, num_ranks)
    by_sample = ([list(group) for _, group in groupby(batch, clips.sample_of)] for batch in batches)
    for batch in load(clips, by_sample, clips.data, pin_memory, on_failure):
        yield batch.padded(size)


def _single(clip: Tensor, label: int | None, key: int, item: int) -> ClipBatch:
    return ClipBatch(
        clip, torch.tensor(-1 if label is None else label), torch.tensor(key), torch.tensor(item)
    )
