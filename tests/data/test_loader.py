"""Tests of the loader: an epoch has exactly its samples despite bad files, crashes and resumed runs."""

from __future__ import annotations

import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.config import BatchPlan, DataConfig, Experiment
from everest_ds.data import loader, reading
from everest_ds.data.clip_batches import MISSING, Batch, ClipBatch
from everest_ds.data.clips import EvaluationClips, evaluation_views, training_batches
from everest_ds.data.decoding.decord import DecordVideo
from everest_ds.data.decoding.pyav import PyAVVideo
from everest_ds.data.decoding.video import Video
from everest_ds.data.order import (
    FINGERPRINT,
    epoch_order,
    fingerprint,
    stand_ins,
    steps_per_epoch,
    training_visits,
    was_saved_with,
)
from everest_ds.data.reading import Failure
from everest_ds.data.video_list import Sample, read_manifest
from everest_ds.errors import DataError
from tests.training.faults import replaced
from tests.training.runs import experiment


@pytest.fixture
def samples(motion_data: Path) -> list[Sample]:
    return list(read_manifest(motion_data / "train.txt", root=None, num_classes=6, labelled=True))


@pytest.fixture
def broken(samples: list[Sample], tmp_path: Path) -> list[Sample]:
    """The samples, with files 3 and 4 replaced by files that are not videos."""
    for number in (3, 4):
        path = tmp_path / f"broken{number}.mp4"
        path.write_bytes(b"no video")
        samples[number] = Sample(path, samples[number].label)
    return samples


@given(
    samples=st.integers(2, 80),
    repeats=st.integers(1, 3),
    micro=st.integers(1, 3),
    accum=st.integers(1, 3),
    degree=st.integers(1, 3),
    cut=st.integers(0, 40),
)
def test_an_epoch_interrupted_anywhere_and_resumed_on_other_ranks_takes_its_samples_once(
    samples: int, repeats: int, micro: int, accum: int, degree: int, cut: int
) -> None:
    before = BatchPlan(micro * repeats, accum, degree, repeats)
    after = BatchPlan(micro * accum * repeats, 1, degree, repeats)
    alone = BatchPlan(before.global_batch_size, 1, 1, repeats)
    if before.samples_per_step > samples:
        return
    stop = steps_per_epoch(samples, before)
    cut = min(cut, stop)
    halves = [(before, 0, cut), (after, cut, stop)]
    taken = Counter(
        visit
        for plan, first, last in halves
        for rank in range(plan.data_parallel_degree)
        for batch in training_visits(samples, plan, 5, rank, first, last)
        for visit in batch
    )
    whole = [visit for batch in training_visits(samples, alone, 5, 0, 0, stop) for visit in batch]
    assert taken == Counter(whole) and set(taken.values()) == {1}
    assert [visit.sample for visit in whole] == epoch_order(5, 0, samples)[: len(whole)].tolist()
    assert samples - len(whole) < before.samples_per_step


def test_a_data_set_is_known_by_paths_labels_spans_and_order_but_not_by_its_place(tmp_path: Path) -> None:
    def samples(root: str, *changes: tuple[int, Sample]) -> list[Sample]:
        listed = [Sample(Path(root, f"c{n % 3}", f"v{n // 3}.mp4"), n % 3) for n in range(9)]
        for index, sample in changes:
            listed[index] = Sample(Path(root) / sample.path, sample.label, sample.span)
        return listed

    here = samples("/data/k400")
    position = {FINGERPRINT: fingerprint(here, 5)}
    assert was_saved_with(position, samples("/scratch/job-7/k400"), 5)
    others = {
        "folder": samples("/data/k400", (4, Sample(Path("c2/v1.mp4"), 1))),
        "label": samples("/data/k400", (4, Sample(Path("c1/v1.mp4"), 2))),
        "span": samples("/data/k400", (4, Sample(Path("c1/v1.mp4"), 1, (0, 10)))),
        "order": here[::-1],
        "number": here[:-1],
    }
    assert not any(was_saved_with(position, other, 5) for other in others.values())
    assert not was_saved_with(position, here, 6)


@given(st.integers(0, 99), st.integers(0, 99), st.integers(2, 200), st.data())
def test_a_stand_in_is_another_sample(seed: int, epoch: int, samples: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, samples - 1))
    others = list(stand_ins(seed, epoch, index, samples))
    assert others and index not in others and all(0 <= other < samples for other in others)


def load_all(
    samples: Sequence[Sample], config: Experiment, ranks: int, steps: range
) -> tuple[list[ClipBatch], set[Failure]]:
    """Return the global batches of 8 clips, joined over all ranks, and the samples that could not be read."""
    failures: list[Failure] = []
    plan = BatchPlan(8 // ranks, 1, ranks, config.data.repeats)
    shares = [
        list(training_batches(samples, config, plan, rank, steps, False, failures.append))
        for rank in range(ranks)
    ]
    return [ClipBatch(*map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)], set(
        failures
    )


def test_a_broken_video_is_replaced_alone_and_alike_on_any_ranks_and_workers(
    broken: list[Sample], motion_data: Path, tmp_path: Path
) -> None:
    config = experiment(motion_data, tmp_path, data={"num_workers": 0})
    whole = read_manifest(motion_data / "train.txt", root=None, num_classes=6, labelled=True)
    expected, none = load_all(whole, config, 1, range(3))
    alone, failures = load_all(broken, config, 1, range(3))
    workers = experiment(motion_data, tmp_path, data={"num_workers": 2})
    spread, also = load_all(broken, workers, 2, range(3))
    late, _ = load_all(broken, config, 2, range(2, 3))
    assert not none and failures == also and {f.slot for f in failures} == {3, 4}
    order = epoch_order(0, 0, 24)
    for step, (there, here, elsewhere) in enumerate(zip(expected, alone, spread, strict=True)):
        assert all(torch.equal(a, b) for a, b in zip(here, elsewhere, strict=True))
        for place, sample in enumerate(order[8 * step : 8 * step + 8]):
            same = torch.equal(there.clip[place], here.clip[place])
            assert same == (sample not in (3, 4))
            stand_in = next(i for i in stand_ins(0, 0, int(sample), 24) if i not in (3, 4))
            assert here.item[place] == (sample if same else stand_in)
    assert torch.equal(late[0].clip, alone[2].clip)


def test_a_run_that_can_read_nothing_says_so(
    motion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_PAUSE_S", 0)
    gone = [Sample(tmp_path / f"{i}.mp4", 0) for i in range(24)]
    config = experiment(motion_data, tmp_path, data={"num_workers": 1})
    message = r"\d+.mp4: cannot be read, nor can 8 replacements.* no such video file"
    with pytest.raises(DataError, match=message):
        load_all(gone, config, 1, range(1))


def test_a_read_that_fails_once_is_tried_again(
    samples: list[Sample], motion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: Counter[Path] = Counter()
    open_sample = reading.open_sample

    def stumbling(sample: Sample, data: DataConfig, with_motion: bool) -> Video:
        seen[sample.path] += 1
        if seen[sample.path] == 1:
            raise OSError("stale file handle")
        return open_sample(sample, data, with_motion)

    monkeypatch.setattr(reading, "open_sample", stumbling)
    config = experiment(motion_data, tmp_path, data={"num_workers": 0})
    batches, failures = load_all(samples, config, 1, range(1))
    assert not failures and len(batches) == 1 and set(seen.values()) == {2}


@pytest.mark.parametrize(
    ("deed", "reason"), [("crash", r"crashes the video decoder \(SIGSEGV\)"), ("hang", "longer than 1 s")]
)
def test_a_video_that_takes_its_worker_along_is_named_and_replaced(
    samples: list[Sample],
    motion_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    deed: str,
    reason: str,
) -> None:
    open_sample = reading.open_sample

    def deadly(sample: Sample, data: DataConfig, with_motion: bool) -> Video:
        if sample == samples[7]:
            os.kill(os.getpid(), signal.SIGSEGV) if deed == "crash" else time.sleep(600)
        return open_sample(sample, data, with_motion)

    config = experiment(motion_data, tmp_path, data={"num_workers": 2, "read_timeout_s": 1})
    expected, _ = load_all(samples, config, 1, range(3))
    monkeypatch.setattr(reading, "open_sample", deadly)
    monkeypatch.setattr(loader, "_POLL_S", 0.3)
    batches, failures = load_all(samples, config, 1, range(3))
    (failure,) = failures
    assert (failure.epoch, failure.slot, failure.sample) == (0, 7, 7)
    assert re.search(reason, failure.reason)
    different = [
        order
        for order, there, here in zip(
            epoch_order(0, 0, 24),
            torch.cat([b.clip for b in expected]),
            torch.cat([b.clip for b in batches]),
            strict=True,
        )
        if not torch.equal(there, here)
    ]
    assert different == [7]


def test_repeats_are_different_crops_of_the_same_frames(
    samples: list[Sample], motion_data: Path, tmp_path: Path
) -> None:
    config = experiment(motion_data, tmp_path, data={"num_workers": 0, "repeats": 2})
    once = experiment(motion_data, tmp_path, data={"num_workers": 0})
    (batch,), _ = load_all(samples, config, 1, range(1))
    (single,), _ = load_all(samples, once, 1, range(1))
    assert batch.item.tolist() == single.item[:4].repeat_interleave(2).tolist()
    assert torch.equal(batch.clip[::2], single.clip[:4])  # the first repeat equals the clip without repeats
    assert not torch.equal(batch.clip[::2], batch.clip[1::2]) and len(set(batch.key.tolist())) == 8


def test_a_missing_video_leaves_evaluation_in_step_and_is_not_replaced(
    broken: list[Sample], motion_data: Path, tmp_path: Path
) -> None:
    config = experiment(motion_data, tmp_path, data={"num_workers": 1})
    clips = EvaluationClips(broken, config, segments=1, crops=1)

    def views(rank: int) -> Iterator[Batch]:
        return evaluation_views(clips, 5, rank, 2, False, failures.append)

    failures: list[Failure] = []
    shares = [list(views(rank)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1])
    assert {len(batch.item) for share in shares for batch in share} == {5}
    items = {item for share in shares for batch in share for item in batch.item.tolist()}
    assert items == set(range(24)) - {3, 4} | {MISSING} and {f.sample for f in failures} == {3, 4}


@pytest.mark.parametrize(
    ("batch_size", "sizes"), [(24, [24]), (10, [8, 8, 8]), (7, [6] * 4), (5, [5] * 5), (99, [24])]
)
def test_evaluation_batches_have_one_size_and_each_view_once(
    samples: list[Sample], motion_data: Path, tmp_path: Path, batch_size: int, sizes: list[int]
) -> None:
    config = experiment(motion_data, tmp_path, data={"num_workers": 0})
    clips = EvaluationClips(samples, config, segments=1, crops=1)
    batches = list(evaluation_views(clips, batch_size, 0, 1, False, lambda failure: None))
    assert [len(batch.item) for batch in batches] == sizes
    assert all(len(tensor) == len(batch.item) for batch in batches for tensor in batch)
    items = [item for batch in batches for item in batch.item.tolist()]
    assert [item for item in items if item != MISSING] == list(range(24))
    padding = torch.cat([b.clip[b.item == MISSING] for b in batches])
    assert torch.equal(padding, batches[-1].clip[-1:].expand_as(padding))


class DecodingNotes:
    """A file with a line for each file that any process opens and each picture that it decodes."""

    def __init__(self, file: Path) -> None:
        self.lines = open(file, "a", buffering=1)

    def opened(self, open_sample: Callable[..., Any]) -> Callable[..., Any]:
        def noted(sample: Sample, data: DataConfig, with_motion: bool) -> Any:
            print("opened", sample.path, file=self.lines)
            return open_sample(sample, data, with_motion)

        return noted

    def decoded(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        def noted(video: PyAVVideo, wanted: set[int] | None) -> Iterator[tuple[int, Any]]:
            for number, frame in decode(video, wanted):
                print("decoded", video.path, number, file=self.lines)
                yield number, frame

        return noted

    def asked(self, read: Callable[..., Any]) -> Callable[..., Any]:
        """Note what decord is asked for, as its own decoding cannot be seen; it decodes again to go back."""

        def noted(video: DecordVideo, indices: Sequence[int]) -> Any:
            for before, number in pairwise([-1, *indices]):
                print("decoded", video.path, number if number > before else "again", file=self.lines)
            return read(video, indices)

        return noted


@contextmanager
def noted_decoding(file: Path) -> Iterator[None]:
    notes = DecodingNotes(file)
    with notes.lines, replaced(reading, "open_sample", notes.opened):
        with replaced(PyAVVideo, "_decoded", notes.decoded), replaced(DecordVideo, "_read", notes.asked):
            yield


@pytest.mark.parametrize("decoder", ["pyav", "decord"])
@pytest.mark.parametrize(
    ("batch_size", "ranks", "workers"), [(4, 3, 0), (7, 2, 2), (15, 1, 2), (33, 2, 1), (99, 4, 0)]
)
def test_evaluation_opens_each_file_once_and_decodes_each_frame_once(
    samples: list[Sample],
    motion_data: Path,
    tmp_path: Path,
    decoder: str,
    batch_size: int,
    ranks: int,
    workers: int,
) -> None:
    """The segments overlap, and batches end within a sample's views; every clip is as if read alone."""
    few = samples[:7]
    config = experiment(motion_data, tmp_path, data={"num_workers": workers, "decoder": decoder})
    clips = EvaluationClips(few, config, segments=5, crops=3)
    with noted_decoding(tmp_path / "notes"):
        shares = [
            list(evaluation_views(clips, batch_size, rank, ranks, False, print)) for rank in range(ranks)
        ]
    notes = Counter((tmp_path / "notes").read_text().splitlines())
    opened = {line: count for line, count in notes.items() if line.startswith("opened")}
    assert opened == {f"opened {sample.path}": 1 for sample in few}
    assert len(notes) > 5 * len(opened) and set(notes.values()) == {1}
    assert not any(line.endswith("again") for line in notes)
    assert len({len(share) for share in shares}) == 1
    batches = [batch for share in shares for batch in share]
    (size,) = {len(batch.item) for batch in batches}
    assert size <= batch_size
    found = [(int(i), clip) for batch in batches for i, clip in zip(batch.item, batch.clip, strict=True)]
    views = {item: clip for item, clip in found if item != MISSING}
    assert sorted(item for item, _ in found if item != MISSING) == list(range(len(clips))) == sorted(views)
    assert all(torch.equal(views[item], clips[[item]].clips[0].clip) for item in range(0, len(clips), 8))


def test_resuming_decodes_nothing_that_was_seen(
    samples: list[Sample], motion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    open_sample = reading.open_sample

    def open_and_note(sample: Sample, data: DataConfig, with_motion: bool) -> Any:
        opened.append(sample.path)
        return open_sample(sample, data, with_motion)

    monkeypatch.setattr(reading, "open_sample", open_and_note)
    config = experiment(motion_data, tmp_path, data={"num_workers": 0})
    load_all(samples, config, 1, range(1000, 1001))
    order = epoch_order(0, 333, 24)
    assert opened == [samples[i].path for i in order[8:16]]
