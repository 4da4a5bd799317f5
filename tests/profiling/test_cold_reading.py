"""Tests of cold reads of a store's samples, against its pages and a disk that is slowed down."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from everest_ds.costs.bottleneck import LoadingCost
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.store import stored_video
from everest_ds.data.store.index import open_store
from everest_ds.data.video_list import Sample
from everest_ds.profiling import cold_reading, storage_rates
from everest_ds.profiling.cold_reading import copies_of_stored, measure_cold
from everest_ds.profiling.loading_stages import measure_stages
from everest_ds.profiling.storage_rates import disk_rate
from tests.data.store.conftest import pack
from tests.profiling.test_loading_stages import experiment

_READS = 1 + 8  # of a clip: the sizes of the frames, and each of its frames
_PAGE_BYTES = 4096


@pytest.fixture(scope="module")
def packed(motion_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Sequence[Sample]:
    """Two samples of a store whose shards are on the disk."""
    store = tmp_path_factory.mktemp("packed") / "store"
    pack(motion_data / "val.txt", store)
    os.sync()
    return list(open_store(store))[:2]


@pytest.fixture
def stored(packed: Sequence[Sample], monkeypatch: pytest.MonkeyPatch) -> Sequence[Sample]:
    """Shorten the measurements, and skip the test if the store lies in memory."""
    monkeypatch.setattr(cold_reading, "_READ_S", 0.2)
    monkeypatch.setattr(storage_rates, "_READ_S", 0.1)
    rate = disk_rate([packed[0].file])
    if rate is None or not rate.cold:
        pytest.skip("the temporary folder lies in memory")
    return packed


def test_a_disk_delivers_whole_pages(stored: Sequence[Sample]) -> None:
    cost = measure_stages(stored, experiment(), None, 1.0).cost
    cold = measure_cold(cost, stored, experiment())
    assert cost.wait_ms is None and cold.wait_ms is not None and cold.wait_ms > 0
    assert 0 < cold.read_bytes < cost.read_bytes + 2 * _READS * _PAGE_BYTES
    assert (cold.decode_ms, cold.crop_ms, cold.collate_ms) == (cost.decode_ms, cost.crop_ms, cost.collate_ms)


def test_a_worker_waits_for_every_read_of_a_slow_disk(
    stored: Sequence[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = stored_video.read_part

    def read_slowly(*place: object) -> bytes:
        time.sleep(0.005)
        return read(*place)  # type: ignore[arg-type]

    monkeypatch.setattr(stored_video, "read_part", read_slowly)
    cost = measure_stages(stored, experiment(), None, 0.0).cost
    waits = measure_cold(cost, stored, experiment()).wait_ms
    assert waits is not None and 0.9 < waits / (5 * _READS) < 2


def test_copies_hold_the_same_frames_in_other_files(stored: Sequence[Sample], tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir()
    copies, data = copies_of_stored(stored, tmp_path / "copies"), experiment().data
    assert {copy.file.parent for copy in copies} == {tmp_path / "copies"}
    for sample, copy in zip(stored, copies, strict=True):
        with open_sample(sample, data) as video, open_sample(copy, data) as same:
            assert torch.equal(video.read([0, 3]), same.read([0, 3]))


def test_a_system_that_does_not_count_leaves_the_cost_as_it_is(
    stored: Sequence[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_rates, "_IO_COUNTS", tmp_path / "none")
    cost = LoadingCost(5.0, read_bytes=1e5)
    assert measure_cold(cost, stored, experiment()) is cost
