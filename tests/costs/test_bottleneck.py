"""Tests of the bottleneck's arithmetic, against a simulated pipeline and cases computed by hand."""

from __future__ import annotations

import heapq
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.costs.bottleneck import (
    Change,
    LoadingCost,
    MeasuredLoading,
    Supply,
    changed_data,
    changed_settings,
    find_bottleneck,
    find_remedies,
)

COST = LoadingCost(decode_ms=80, crop_ms=6, collate_ms=4, pack_ms=10, read_bytes=1e6)
SUPPLY = Supply(
    workers=4,
    cores=8,
    clip_bytes=2.4e6,
    packed_bytes=0.8e6,
    disk_bytes_per_s=1e9,
    copy_bytes_per_s=2.4e9,
    model_clips_per_s=500,
)


def simulated_clips_per_s(cost: LoadingCost, supply: Supply, clips: int = 4000) -> float:
    """Follow every clip of one rank through disk, cores, copies and device.

    A worker reads a sample and then decodes it; copies and device have endless queues before them.
    """
    times = {"disk": 0.0, "copy": 0.0, "device": 0.0}

    def serve(name: str, arrival: float, seconds: float) -> float:
        times[name] = max(times[name], arrival) + seconds
        return times[name]

    groups_on_disk = supply.ranks_per_node // supply.tensor
    workers = [0.0] * supply.workers * supply.tensor
    cores = [0.0] * int(supply.cores) * supply.tensor
    for number in range(clips):
        arrival = heapq.heappop(workers)
        if number % supply.repeats == 0:  # one sample of each rank of the node, read in turn
            assert supply.disk_bytes_per_s
            for _ in range(groups_on_disk):
                read = serve("disk", arrival, cost.read_bytes / supply.disk_bytes_per_s)
            arrival = read
        ms = cost.decode_ms * (number % supply.repeats == 0) + cost.crop_ms + cost.collate_ms
        ms += cost.pack_ms if supply.packs else 0
        start = max(heapq.heappop(cores), arrival)
        heapq.heappush(cores, start + ms / 1e3)
        heapq.heappush(workers, start + ms / 1e3)
        sent = supply.packed_bytes if supply.packs else supply.clip_bytes
        assert supply.copy_bytes_per_s and supply.model_clips_per_s
        copied = serve("copy", start + ms / 1e3, sent / supply.copy_bytes_per_s)
        serve("device", copied, 1 / supply.model_clips_per_s)
    return clips / times["device"]


@pytest.mark.parametrize(
    "binding, changed",
    [
        ("decoding", {}),
        ("decoding", {"repeats": 4, "packs": True}),
        ("decoding", {"tensor": 2, "ranks_per_node": 2}),
        ("decoding", {"workers": 2, "disk_bytes_per_s": 5e7}),
        ("decoding", {"workers": 12, "disk_bytes_per_s": 1e8}),
        ("disk", {"workers": 1, "disk_bytes_per_s": 1e7}),
        ("disk", {"workers": 3, "disk_bytes_per_s": 2e7, "repeats": 2}),
        ("disk", {"disk_bytes_per_s": 2e8, "ranks_per_node": 8}),
        ("disk", {"disk_bytes_per_s": 1e8, "ranks_per_node": 8, "tensor": 2, "repeats": 2}),
        ("copies", {"copy_bytes_per_s": 5e7}),
        ("copies", {"copy_bytes_per_s": 2e7, "packs": True}),
        ("compute", {"model_clips_per_s": 12.0}),
        ("compute", {"model_clips_per_s": 30.0, "workers": 20}),
    ],
)
def test_a_rank_gets_clips_as_fast_as_through_a_simulated_pipeline(
    binding: str, changed: dict[str, Any]
) -> None:
    supply = replace(SUPPLY, **changed)
    found = find_bottleneck(COST, supply)
    assert found.binding == binding
    assert found.clips_per_s == pytest.approx(simulated_clips_per_s(COST, supply), rel=0.03)


def test_rates_are_those_computed_by_hand() -> None:
    rates = SUPPLY.rates(COST)
    assert rates["decoding"] == pytest.approx(4 / 0.090)  # 80 + 6 + 4 ms, four workers
    assert rates["disk"] == pytest.approx(1000)
    assert rates["copies"] == pytest.approx(1000)
    assert replace(SUPPLY, repeats=4, packs=True).rates(COST)["decoding"] == pytest.approx(4 / 0.040)


@pytest.mark.parametrize("changed, busy_s", [({"workers": 0}, 0.091), ({"cores": 0.0}, 0.090)])
def test_without_spare_cores_decoding_and_training_take_turns(changed: dict[str, Any], busy_s: float) -> None:
    """A rank that decodes itself waits 1 ms for the disk; other workers read while one of them decodes."""
    found = find_bottleneck(COST, replace(SUPPLY, model_clips_per_s=10.0, **changed))
    assert found.clips_per_s == pytest.approx(1 / (busy_s + 0.1))  # a clip is decoded, then trained on
    assert "take turns" in found.sentence()


@pytest.mark.parametrize("wait_ms, clip_s", [(None, 0.190), (30.0, 0.120), (0.0, 0.100)])
def test_a_worker_waits_as_measured_or_else_for_all_bytes(wait_ms: float | None, clip_s: float) -> None:
    """The disk needs 100 ms for a megabyte, and the worker 90 ms of its core, some of it at the same time."""
    cost = replace(COST, wait_ms=wait_ms)
    alone = replace(SUPPLY, workers=1, disk_bytes_per_s=1e7)
    assert find_bottleneck(cost, alone).loader_clips_per_s == pytest.approx(1 / clip_s)
    unknown = replace(alone, disk_bytes_per_s=None)
    assert find_bottleneck(cost, unknown).loader_clips_per_s == pytest.approx(1 / 0.090)


def test_a_sentence_names_what_binds_and_by_how_much() -> None:
    waits = find_bottleneck(COST, replace(SUPPLY, basis="measured")).sentence()
    assert waits.startswith("decoding binds: 44 clips/s per rank (measured)")
    assert "11 x as many: 500 clips/s per rank (predicted)" in waits  # 500 / 44
    fed = find_bottleneck(COST, replace(SUPPLY, model_clips_per_s=22.0)).sentence()
    assert fed.startswith("compute binds: 22 clips/s per rank (predicted)") and "2 x as many: 44 " in fed
    unknown = find_bottleneck(COST, replace(SUPPLY, model_clips_per_s=None))
    assert unknown.factor is None and "unknown" in unknown.sentence()


def test_remedies_are_what_the_changed_settings_give_and_the_best_comes_first() -> None:
    changes = [*changed_settings(COST, SUPPLY, can_pack=True)]
    other = replace(COST, decode_ms=8.0)
    changes.append(Change("reencode", "everest-ds data reencode", other, SUPPLY, "measured on copies"))
    found = {remedy.name: remedy for remedy in find_remedies(COST, SUPPLY, changes)}
    now = 4 / 0.091  # 1 ms of it waits for the disk
    assert found["workers"].apply == "data.num_workers=8"
    assert found["workers"].gain == pytest.approx(2)
    assert found["repeats"].clips_per_s == pytest.approx(4 / 0.03025)
    assert found["reencode"].gain == pytest.approx(4 / 0.019 / now)
    assert found["pack_tokens"].gain == pytest.approx(91 / 101)  # selecting costs time where decoding binds
    assert list(found) == ["reencode", "repeats", "workers", "pack_tokens"]


def test_other_forms_of_the_data_cost_their_usual_share() -> None:
    supply = replace(SUPPLY, packed_bytes=2e6, disk_bytes_per_s=1e9, ranks_per_node=4)
    changes = list(changed_data(COST, supply, 0.1, can_cache=True))
    found = {remedy.name: remedy for remedy in find_remedies(COST, supply, changes)}
    rest_ms = COST.crop_ms + COST.collate_ms + 1  # of which 1 ms waits for the disk
    assert found["pack"].loader_clips_per_s == pytest.approx(4e3 / (0.1 * COST.decode_ms + rest_ms))
    # The four ranks of a node read 2 MB for each clip: the disk binds, and not the 1.6 ms of a core.
    assert found["cache"].loader_clips_per_s == pytest.approx(1e9 / 4 / 2e6)
    assert found["cache"].binding == "disk"
    assert not list(changed_data(COST, supply, None, can_cache=False))


def test_no_gain_is_promised_beyond_what_binds_next() -> None:
    supply = replace(SUPPLY, model_clips_per_s=60.0)
    for remedy in find_remedies(COST, supply, changed_settings(COST, supply, can_pack=False)):
        assert remedy.clips_per_s == 60.0 and remedy.binding == "compute"
        assert remedy.loader_clips_per_s > 60.0


def test_a_setting_that_is_at_its_best_is_not_suggested() -> None:
    best = replace(SUPPLY, workers=8, repeats=4, packs=True)
    assert not list(changed_settings(COST, best, can_pack=True))
    assert not list(changed_settings(COST, replace(best, packs=False), can_pack=False))


def test_a_measurement_is_read_back_from_its_json() -> None:
    found = MeasuredLoading(COST, None, 2e9, "on a node, 2026-01-01")
    assert MeasuredLoading.from_json(found.as_json()) == found


positive = st.floats(0.1, 1e3)
costs = st.builds(LoadingCost, positive, positive, positive, positive, st.floats(1e3, 1e8))
supplies = st.builds(
    Supply,
    workers=st.integers(1, 32),
    cores=st.floats(0.5, 32),
    clip_bytes=st.floats(1e6, 1e7),
    packed_bytes=st.floats(1e5, 1e6),
    repeats=st.integers(1, 8),
    packs=st.booleans(),
    ranks_per_node=st.sampled_from([1, 2, 4, 8]),
    tensor=st.just(1),
    disk_bytes_per_s=st.none() | st.floats(1e6, 1e10),
    copy_bytes_per_s=st.none() | st.floats(1e6, 1e10),
    model_clips_per_s=st.none() | positive,
)


@given(costs, supplies, st.data())
def test_more_of_any_resource_never_lowers_the_rate(
    cost: LoadingCost, supply: Supply, data: st.DataObject
) -> None:
    before = find_bottleneck(cost, supply).clips_per_s
    more = data.draw(st.floats(1, 10))
    changes: list[dict[str, Any]] = [
        {"workers": supply.workers + 1},
        {"cores": supply.cores * more},
        {"repeats": supply.repeats + 1},
        {"disk_bytes_per_s": supply.disk_bytes_per_s and supply.disk_bytes_per_s * more},
        {"copy_bytes_per_s": supply.copy_bytes_per_s and supply.copy_bytes_per_s * more},
        {"model_clips_per_s": supply.model_clips_per_s and supply.model_clips_per_s * more},
    ]
    for change in changes:
        assert find_bottleneck(cost, replace(supply, **change)).clips_per_s >= before * (1 - 1e-12), change
    for stage in ("decode_ms", "crop_ms", "collate_ms", "read_bytes"):
        cheaper = replace(cost, **{stage: getattr(cost, stage) / more})
        assert find_bottleneck(cheaper, supply).clips_per_s >= before * (1 - 1e-12), stage


@given(costs, supplies)
def test_a_rank_never_gets_more_than_its_slowest_resource_gives(cost: LoadingCost, supply: Supply) -> None:
    found = find_bottleneck(cost, supply)
    assert found.clips_per_s <= min(found.rates.values())
    assert found.rates[found.binding] == min(found.rates.values())
