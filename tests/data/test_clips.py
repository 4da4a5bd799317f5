"""Tests of frame sampling, crops, order and clips: exact, and the same on any number of ranks and workers."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.config import BatchPlan
from everest_ds.data.clips import EvaluationClips, TrainingClips, training_batches
from everest_ds.data.frames import ClipFrames
from everest_ds.data.order import EvaluationPlan, Visit, sample_key, training_visits
from everest_ds.data.transforms import Box, crop_resize, train_box, view_box
from everest_ds.data.video_list import read_manifest
from everest_ds.errors import DataError
from tests.training.runs import experiment

SAMPLING = st.sampled_from(["stride", "segments"])


@given(st.integers(1, 300), st.integers(1, 20), st.integers(1, 8), SAMPLING, st.integers(0, 99))
def test_training_frames_are_ordered_and_inside(
    length: int, count: int, stride: int, sampling: str, seed: int
) -> None:
    rng, clip = np.random.default_rng(seed), ClipFrames(count, stride, sampling, hold_last_frame=False)
    if length < clip.needed:
        with pytest.raises(DataError, match="too short"):
            clip.for_training(length, rng)
        return
    frames = clip.for_training(length, rng)
    assert len(frames) == count and min(frames) >= 0 and max(frames) < length
    steps = set(np.diff(frames).tolist())
    assert steps <= {stride} if sampling == "stride" else all(step >= 0 for step in steps)


@given(st.integers(31, 300), st.integers(1, 6), SAMPLING)
def test_views_spread_from_the_first_frame_to_the_last(length: int, views: int, sampling: str) -> None:
    rule = ClipFrames(16, 2, sampling, hold_last_frame=False)
    clips = [rule.for_view(length, view, views) for view in range(views)]
    assert all(0 <= min(c) and max(c) < length for c in clips)
    if sampling == "stride" and views > 1:
        assert clips[0][0] == 0 and clips[-1][-1] == length - 1


@given(st.integers(1, 40), st.integers(1, 4), SAMPLING, st.integers(0, 99))
def test_a_held_last_frame_fills_a_clip_that_its_video_does_not(
    length: int, stride: int, sampling: str, seed: int
) -> None:
    rule = ClipFrames(16, stride, sampling, hold_last_frame=True)
    refused = ClipFrames(16, stride, sampling, hold_last_frame=False)
    training, view = rule.for_training(length, np.random.default_rng(seed)), rule.for_view(length, 0, 1)
    for frames in (training, view):
        assert len(frames) == 16 and frames == sorted(frames) and 0 <= frames[0] and frames[-1] < length
    if length >= refused.needed:  # a video that is long enough gives the same clip
        assert training == refused.for_training(length, np.random.default_rng(seed))
        assert view == refused.for_view(length, 0, 1)
    elif sampling == "stride":
        moving = list(range(0, length, stride))
        assert training == view == moving + [length - 1] * (16 - len(moving))


@given(
    st.integers(8, 400),
    st.integers(8, 400),
    st.sampled_from(["multi_scale", "random_resized", "center"]),
    st.integers(0, 999),
)
def test_boxes_are_inside_the_frame(height: int, width: int, crop: str, seed: int) -> None:
    box = train_box(height, width, crop, np.random.default_rng(seed))
    assert 0 <= box.top and box.top + box.height <= height and box.height > 0
    assert 0 <= box.left and box.left + box.width <= width and box.width > 0


def test_three_views_cover_the_longer_side() -> None:
    boxes = [view_box(40, 100, view, 3) for view in range(3)]
    assert boxes == [Box(0, 0, 40, 40), Box(0, 30, 40, 40), Box(0, 60, 40, 40)]


def test_a_crop_is_cut_resized_and_flipped() -> None:
    clip = torch.arange(6 * 8, dtype=torch.uint8).view(1, 6, 8, 1).expand(2, 6, 8, 3).contiguous()
    cut = crop_resize(clip, Box(1, 2, 4, 4), 4)
    assert torch.equal(cut, clip[:, 1:5, 2:6])
    assert torch.equal(crop_resize(clip, Box(1, 2, 4, 4), 4, flip=True), cut.flip(2))
    even = torch.full((2, 30, 50, 3), 77, dtype=torch.uint8)
    assert torch.equal(crop_resize(even, Box(3, 5, 20, 30), 16), torch.full((2, 16, 16, 3), 77).byte())


@given(
    samples=st.integers(1, 60),
    micro=st.integers(1, 3),
    accum=st.integers(1, 3),
    epochs=st.integers(1, 3),
    start=st.integers(0, 5),
)
def test_any_number_of_ranks_sees_the_same_global_batches(
    samples: int, micro: int, accum: int, epochs: int, start: int
) -> None:
    """Several ranks together take the batches that one rank takes alone, and no sample twice per epoch."""
    degree = 2
    plan = BatchPlan(micro, accum, degree)
    if plan.global_batch_size > samples:
        return
    stop = epochs * (samples // plan.global_batch_size)
    whole = [
        set(b) for b in training_visits(samples, BatchPlan(plan.global_batch_size, 1, 1), 7, 0, start, stop)
    ]
    ranks = [list(training_visits(samples, plan, 7, rank, start, stop)) for rank in range(degree)]
    for step in range(max(0, stop - start)):
        micros = [ranks[r][step * accum + m] for r in range(degree) for m in range(accum)]
        assert set().union(*micros) == whole[step]
        assert sum(map(len, micros)) == len(whole[step])
    if start == 0:
        seen = Counter(visit for batch in whole for visit in batch)
        assert set(seen.values()) <= {1}


@given(st.integers(0, 50), st.integers(1, 20), st.integers(1, 40), st.integers(1, 5))
def test_evaluation_reads_each_sample_once_in_as_many_reads_on_every_rank(
    samples: int, views: int, batch: int, ranks: int
) -> None:
    plan = EvaluationPlan.of(samples, views, batch)
    shares = [plan.reads(rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    in_order = [read for round_ in zip(*shares, strict=True) for read in round_ if read]
    assert in_order == plan.reads(0, 1) and list(chain(*in_order)) == list(range(samples))
    # The batches of a read hold its views and at most one padded batch, and none of them is empty.
    whole = plan.samples_per_read * views
    assert plan.batch_size <= batch
    assert (plan.batches_per_read - 1) * plan.batch_size < whole <= plan.batches_per_read * plan.batch_size
    assert all(len(read) * views > (plan.batches_per_read - 1) * plan.batch_size for read in in_order)


def test_keys_differ_by_seed_epoch_and_sample() -> None:
    keys = {sample_key(s, e, i) for s in range(5) for e in range(5) for i in range(50)}
    assert len(keys) == 5 * 5 * 50 and all(0 <= key < 2**63 for key in keys)


def test_a_visit_replays_exactly_and_another_epoch_differs(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path, data={"train_crop": "multi_scale", "horizontal_flip": True})
    clips = TrainingClips(
        read_manifest(motion_data / "train.txt", root=None, num_classes=6, labelled=True), config
    )
    once, again, later = (clips[visit].clips[0] for visit in (Visit(0, 3), Visit(0, 3), Visit(1, 3)))
    assert torch.equal(once.clip, again.clip) and once.key == again.key
    assert not torch.equal(once.clip, later.clip) and once.label == later.label == 3
    assert once.clip.dtype == torch.uint8 and once.clip.shape == (4, 32, 32, 3)


def test_the_number_of_workers_changes_nothing(motion_data: Path, tmp_path: Path) -> None:
    samples = read_manifest(motion_data / "train.txt", root=None, num_classes=6, labelled=True)

    def batches(workers: int) -> list[torch.Tensor]:
        config = experiment(motion_data, tmp_path, data={"num_workers": workers})
        plan = BatchPlan(4, 1, 1)
        return [b.clip for b in training_batches(samples, config, plan, 0, range(2, 8), False, print)]

    for alone, many in zip(batches(0), batches(3), strict=True):
        assert torch.equal(alone, many)


def test_views_are_counted_segment_by_crop(motion_data: Path, tmp_path: Path) -> None:
    samples = read_manifest(motion_data / "test.txt", root=None, num_classes=6, labelled=True)
    clips = EvaluationClips(samples, experiment(motion_data, tmp_path), segments=2, crops=3)
    assert len(clips) == 12 * 6
    first, crop, segment = (clip.clip for clip in clips[6, 7, 9].clips)
    assert torch.equal(first, crop)  # all crops of a square frame are equal
    assert not torch.equal(first, segment)  # segments differ
    assert all(torch.equal(clips[i,].clips[0].clip, one) for i, one in ((6, first), (9, segment)))


def test_iifs_decodes_its_candidates_and_evaluation_draws_by_view(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path, tokens={"frame_oversampling": 2.0})
    samples = read_manifest(motion_data / "test.txt", root=None, num_classes=6, labelled=True)
    assert TrainingClips(samples, config)[Visit(0, 3)].clips[0].clip.shape == (8, 32, 32, 3)
    views = EvaluationClips(samples, config, segments=2, crops=1)
    assert views[0,].clips[0].clip.shape == (8, 32, 32, 3)
    assert len({int(views[i,].clips[0].key) for i in range(6)}) == 6
