"""Data sets of clips: random clips for training, fixed views for evaluation.

A clip is a uint8 tensor (frame, row, column, colour); conversion to floating point happens on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from everest_ds.config import BatchPlan, Experiment
from everest_ds.config.mesh_shape import Turn
from everest_ds.config.tokens import ClipGeometry
from everest_ds.data.clip_batches import MISSING, Batch, ClipBatch, PackedBatch, map_tensors, padded_batch
from everest_ds.data.clip_source import LoadedItem, NewClip, Pack, new_clip
from everest_ds.data.decoding.video import Need, Pictures, Size
from everest_ds.data.frames import ClipFrames
from everest_ds.data.loader import load
from everest_ds.data.order import EvaluationPlan, Visit, sample_key, stand_ins, training_visits
from everest_ds.data.reading import DamagedCopyError, Failure, SampleReader
from everest_ds.data.store.cached_draws import read_draw
from everest_ds.data.store.token_cache import TokenCache
from everest_ds.data.transforms import Box, crop_motion, crop_pictures, needed_by, train_box, view_box
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError

# A view and its random key are the same in every evaluation of every run.
_VIEW_SEED = 0
# Seed beside a clip's key, so that the draws in space are independent of those in time.
_SPACE = 1


class View(NamedTuple):
    """One view of a sample in multi-view evaluation: a temporal segment and a spatial crop."""

    sample: int
    segment: int
    crop: int


class _Crop(NamedTuple):
    """The random crop of one clip: its place, and whether it is mirrored."""

    box: Box
    flip: bool


class TrainingClips:
    """A data set of random clips, `data.repeats` per sample, determined by (seed, epoch, sample).

    If `data.draws` is set, the pixels of a clip are those of the epoch modulo `data.draws`, while its key,
    from which a model draws masks and dropped paths, still differs from epoch to epoch.
    """

    def __init__(self, samples: Sequence[Sample], config: Experiment, pack: Pack | None = None) -> None:
        self.reader = SampleReader(samples, config.data, config.tokens.reads_motion)
        self.samples = samples
        self.geometry = config.candidate_geometry
        self.frames = ClipFrames.of(self.geometry.num_frames, config.data)
        self.data = config.data
        self.seed = config.run.seed
        self.pack = pack
        self.new_clip: NewClip = new_clip

    def __getitem__(self, visit: Visit) -> LoadedItem:
        """Return the clips of a visit, from its sample or else from the first replacement that can be read.

        Raises:
            DataError: if neither the sample nor any replacement can be read.
        """
        failures: list[Failure] = []
        others = stand_ins(self.seed, *visit.drawn(self.data.draws), len(self.samples))
        for candidate in chain([visit.sample], others):
            try:
                read = self.read(visit, candidate)
            except DataError as error:
                failures.append(Failure.of(error, epoch=visit.epoch, slot=visit.sample, sample=candidate))
            else:
                return LoadedItem(read.clips, failures + read.failures)
        raise DataError(
            f"{self.samples[visit.sample].name}: cannot be read, nor can {len(failures) - 1} replacements",
            given=failures[0].reason,
            fix="check the storage; `everest-ds data check` lists all such files",
        )

    def read(self, visit: Visit, sample: int) -> LoadedItem:
        """Return the clips of a visit, cut from `sample`.

        Raises:
            DataError: if the sample cannot be read.
        """
        pictures = self.reader.read(sample, partial(self.choose, visit), partial(self.need, visit))
        return LoadedItem(self.crops(pictures, visit, sample), [])

    def name_of(self, visit: Visit) -> str:
        """Return the name of the visit's sample, for messages."""
        return self.samples[visit.sample].name

    def choose(self, visit: Visit, video_frames: int) -> list[int]:
        """Return the indices of the frames that this visit reads from a video of `video_frames` frames."""
        rng = np.random.default_rng(sample_key(self.seed, *visit.drawn(self.data.draws)))
        return self.frames.for_training(video_frames, rng)

    def need(self, visit: Visit, size: Size) -> Need:
        """Return the part of the pictures that this visit needs from a video of this size."""
        crops = [self._crop(size, visit, repeat) for repeat in range(self.data.repeats)]
        return needed_by([crop.box for crop in crops], self.geometry.image_size)

    def crops(self, pictures: Pictures, visit: Visit, sample: int) -> list[Batch]:
        """Crop the visit's clips from the decoded pictures of `sample`."""
        return [self._clip(pictures, visit, sample, repeat) for repeat in range(self.data.repeats)]

    def _crop(self, size: Size, visit: Visit, repeat: int) -> _Crop:
        key = sample_key(self.seed, *visit.drawn(self.data.draws), repeat)
        rng = np.random.default_rng((key, _SPACE))
        box = train_box(size.height, size.width, self.data.train_crop, rng)
        return _Crop(box, self.data.horizontal_flip and rng.random() < 0.5)

    def _clip(self, pictures: Pictures, visit: Visit, sample: int, repeat: int) -> Batch:
        box, flip = self._crop(pictures.size, visit, repeat)
        cut = _cut(pictures, box, flip, self.geometry, self.new_clip, self.pack)
        return _single(cut, self.samples[sample].label, sample_key(self.seed, *visit, repeat), sample)


class CachedClips(TrainingClips):
    """A data set of the clips that `TrainingClips` packs, read from a token cache."""

    def __init__(self, samples: Sequence[Sample], config: Experiment, cache: TokenCache) -> None:
        super().__init__(samples, config)
        self.cache = cache

    def read(self, visit: Visit, sample: int) -> LoadedItem:
        """Return the clips of a visit from the draw of `sample`.

        Raises:
            DamagedCopyError: if the draw cannot be read.
        """
        draw = Visit(visit.epoch, sample).drawn(self.data.draws)
        try:
            tubelets, kept = self.reader.attempt(sample, partial(read_draw, self.cache, draw))
        except DataError as error:
            raise DamagedCopyError(str(error)) from None
        item, unread = self.cache.replaced.get(draw, (sample, ()))
        label = self.samples[item].label
        clips = [
            _single((tubelets[i], kept[i]), label, sample_key(self.seed, *visit, i), item)
            for i in range(len(kept))
        ]
        return LoadedItem(clips, [Failure(visit.epoch, visit.sample, *each) for each in unread])


class EvaluationClips:
    """A data set of all views of every sample: `segments` temporal positions times `crops` spatial positions.

    A view that cannot be read is returned as a black clip with item `MISSING`. It is not replaced by another
    video, and every rank still computes the same number of batches.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        config: Experiment,
        segments: int,
        crops: int,
        pack: Pack | None = None,
    ) -> None:
        self.reader = SampleReader(samples, config.data, config.tokens.reads_motion)
        self.samples = samples
        self.geometry = config.candidate_geometry
        self.frames = ClipFrames.of(self.geometry.num_frames, config.data)
        self.data = config.data
        self.segments = segments
        self.crops = crops
        self.num_kept = config.token_counts.num_kept
        self.pack = pack
        self.new_clip: NewClip = new_clip

    def __len__(self) -> int:
        return len(self.samples) * self.segments * self.crops

    def view(self, item: int) -> View:
        """Return the view with this index: a sample's segments are adjacent, and so are a segment's crops."""
        rest, crop = divmod(item, self.crops)
        return View(*divmod(rest, self.segments), crop)

    def sample_of(self, item: int) -> int:
        """Return the index of the sample that a view belongs to."""
        return self.view(item).sample

    def name_of(self, items: Sequence[int]) -> str:
        """Return the name of the sample that these views belong to, for messages."""
        return self.samples[self.sample_of(items[0])].name

    def __getitem__(self, items: Sequence[int]) -> LoadedItem:
        """Return views of one sample; it is opened once, and frames that crops share are decoded once."""
        views = [self.view(item) for item in items]
        sample, segments = views[0].sample, sorted({view.segment for view in views})

        def choose(video_frames: int) -> list[int]:
            of_segments = (self.frames.for_view(video_frames, each, self.segments) for each in segments)
            return list(chain.from_iterable(of_segments))

        def need(size: Size) -> Need:
            return needed_by([self._box(size, item) for item in items], self.geometry.image_size)

        try:
            pictures = self.reader.read(sample, choose, need)
        except DataError as error:
            failure = Failure.of(error, epoch=0, slot=sample, sample=sample)
            return LoadedItem([self.unread(item) for item in items], [failure])
        by_segment = dict(zip(segments, pictures.split(self.geometry.num_frames), strict=True))
        return LoadedItem([self._clip(by_segment[self.view(i).segment], i) for i in items], [])

    def unread(self, item: int) -> Batch:
        """Return the black clip that stands for a view which was not read, marked as `MISSING`."""
        side = self.geometry.image_size
        kept = torch.arange(self.num_kept, dtype=torch.int32)
        black = torch.zeros(self.geometry.num_frames, side, side, 3, dtype=torch.uint8)
        return self._single((black,) if self.pack is None else (black, kept), item, MISSING)

    def items_of(self, sample: int) -> range:
        """Return the indices of all views of a sample."""
        num_views = self.segments * self.crops
        return range(sample * num_views, (sample + 1) * num_views)

    def check_complete(self, seen: Collection[int], missing: Collection[int]) -> None:
        """Raise an error if the results lack a view of a sample that could be read.

        Args:
            seen: the views that the model has evaluated.
            missing: the samples that could not be read.

        Raises:
            DataError: if some samples have views that were not evaluated, although they could be read.
        """
        unseen = {self.sample_of(item) for item in range(len(self)) if item not in seen}
        lost = sorted(unseen - set(missing))
        if lost:
            raise DataError(
                "views of some readable videos were not evaluated",
                given=f"{len(lost)} of {len(self.samples)} videos, the first {self.samples[lost[0]].name}",
                fix="run the same command again; if the error recurs, report it with the logs",
            )

    def _box(self, size: Size, item: int) -> Box:
        return view_box(size.height, size.width, self.view(item).crop, self.crops)

    def _clip(self, pictures: Pictures, item: int) -> Batch:
        box = self._box(pictures.size, item)
        return self._single(_cut(pictures, box, False, self.geometry, self.new_clip, self.pack), item, item)

    def _single(self, cut: tuple[Tensor, ...], view: int, item: int) -> Batch:
        label = self.samples[self.sample_of(view)].label
        return _single(cut, label, sample_key(_VIEW_SEED, 0, view), item)


def training_batches(
    samples: Sequence[Sample],
    config: Experiment,
    plan: BatchPlan,
    rank: int,
    steps: range,
    pin_memory: bool,
    on_failure: Callable[[Failure], None],
    pack: Pack | None = None,
    cache: TokenCache | None = None,
    turn: Turn = Turn(),
) -> Iterator[Any]:
    """Yield this rank's micro-batches for the given optimiser steps, across epochs, decoded ahead of use.

    Args:
        samples: the samples of the training manifest.
        config: the resolved config of the run.
        plan: the split of the global batch over ranks and accumulation steps.
        rank: data-parallel rank of this process.
        steps: the optimiser steps, counted from the start of training.
        pin_memory: deliver the batches in pinned memory.
        on_failure: called for each sample that could not be read, when the affected batch is delivered.
        pack: called in the workers on each clip; the batches are then `PackedBatch`, otherwise `ClipBatch`.
        cache: the token cache to read from; the batches are then `PackedBatch`.
        turn: the turn of this rank among those that read the micro-batches of `rank`.
    """
    source = TrainingClips(samples, config, pack) if cache is None else CachedClips(samples, config, cache)
    visits = training_visits(len(samples), plan, config.run.seed, rank, steps.start, steps.stop)
    return load(source, turn.own(visits), config.data, pin_memory, on_failure)


def evaluation_views(
    clips: EvaluationClips,
    max_batch_size: int,
    rank: int,
    num_ranks: int,
    pin_memory: bool,
    on_failure: Callable[[Failure], None],
    turn: Turn = Turn(),
    exchange: Callable[[Iterator[Batch]], Iterator[Batch]] = iter,
) -> Iterator[Batch]:
    """Yield this rank's share of the views, in batches of one common size of at most `max_batch_size`.

    One worker reads all views of a sample, so that each file is opened once and each frame decoded once.
    Short batches are padded, because kernels are selected, and models compiled, for one shape.

    Args:
        clips: the views.
        max_batch_size: the most views per batch.
        rank: data-parallel rank of this process.
        num_ranks: number of data-parallel ranks.
        pin_memory: deliver the batches in pinned memory, except for padded ones.
        on_failure: called for each sample that this rank could not read.
        turn: the turn of this rank among those that read the share of `rank`.
        exchange: adds the reads of those other ranks to the reads of this rank.
    """
    plan = EvaluationPlan.of(len(clips.samples), clips.segments * clips.crops, max_batch_size)
    reads = [[clips.items_of(sample) for sample in read] for read in plan.reads(rank, num_ranks)]
    own = turn.own(filter(None, reads))
    loaded = exchange(load(clips, own, clips.data, pin_memory, on_failure))
    num_views = plan.batches_per_read * plan.batch_size
    idle = (map_tensors(clips.unread(0), lambda tensor: tensor[None]) for read in reads if not read)
    for read in chain(loaded, (padded_batch(clip, num_views) for clip in idle)):
        for first in range(0, num_views, plan.batch_size):
            part = slice(first, first + plan.batch_size)
            yield padded_batch(map_tensors(read, itemgetter(part)), plan.batch_size)


def _cut(
    pictures: Pictures, box: Box, flip: bool, geometry: ClipGeometry, new_clip: NewClip, pack: Pack | None
) -> tuple[Tensor, ...]:
    """Cut a clip out of decoded pictures; with `pack`, return its result."""
    size, out = geometry.image_size, None
    if pack is None or pack.keeps_clips:
        out = new_clip((geometry.num_frames, size, size, 3))
    clip = crop_pictures(pictures, box, size, flip, out)
    if pack is None:
        return (clip,)
    motion = pictures.motion
    return pack(clip, None if motion is None else crop_motion(motion, box, geometry, flip))


def _single(cut: tuple[Tensor, ...], label: int | None, key: int, item: int) -> Batch:
    """Return one clip, as `_cut` returns it, without the dimension of a batch."""
    facts = torch.tensor(-1 if label is None else label), torch.tensor(key), torch.tensor(item)
    return ClipBatch(*cut, *facts) if len(cut) == 1 else PackedBatch(cut[0], *facts, cut[1])
