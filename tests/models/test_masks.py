"""Tests of the masks: partitions of fixed size in which every token is equally likely."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everest_ds.config.selections import pretrain_counts
from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.selection.masks import (
    random_tokens,
    split_dual,
    split_kept,
    split_tubes,
    whole_slots,
)


def grid_of(num_slots: int, side: int) -> ClipGeometry:
    return ClipGeometry(num_slots, 1, side * 16, 16)


@settings(deadline=None)
@given(num_kept=st.integers(1, 60), data=st.data(), keys=st.lists(st.integers(0, 2**62), max_size=4))
def test_visible_and_predicted_partition_the_kept(
    num_kept: int, data: st.DataObject, keys: list[int]
) -> None:
    num_visible = data.draw(st.integers(0, num_kept))
    generator = torch.Generator().manual_seed(num_kept)
    rows = [torch.randperm(100, generator=generator)[:num_kept].sort().values for _ in (0, *keys)]
    keep_BK = torch.stack(rows)
    visible, predicted = split_kept(keep_BK, num_visible, torch.tensor([7, *keys]))
    assert visible.shape[1] == num_visible
    assert torch.equal(torch.cat([visible, predicted], dim=1).sort(dim=1).values, keep_BK)
    for part in (visible, predicted):
        assert bool((part.diff(dim=1) > 0).all())


def test_every_kept_token_is_equally_often_visible() -> None:
    draws, num_kept, num_visible = 5000, 60, 20
    keep_BK = torch.arange(3, 3 + 2 * num_kept, 2).expand(draws, -1)
    visible, _ = split_kept(keep_BK, num_visible, torch.arange(draws))
    assert_equally_often(torch.bincount((visible.flatten() - 3) // 2, minlength=num_kept), draws, num_visible)


def test_every_token_is_equally_often_kept_by_chance() -> None:
    draws = 5000
    keep = random_tokens(50, 12, torch.arange(draws))
    assert bool((keep.diff(dim=1) > 0).all())
    assert_equally_often(torch.bincount(keep.flatten(), minlength=50), draws, 12)


def test_every_place_is_equally_often_visible_through_a_tube() -> None:
    draws, geometry = 5000, grid_of(2, 7)
    visible, _ = split_tubes(geometry, 2 * 10, torch.arange(draws))
    assert_equally_often(torch.bincount(visible[:, :10].flatten(), minlength=49), draws, 10)


@settings(deadline=None)
@given(slots=st.integers(1, 8), side=st.integers(1, 6), data=st.data())
def test_tubes_show_the_same_places_in_every_slot(slots: int, side: int, data: st.DataObject) -> None:
    places = side**2
    shown = data.draw(st.integers(0, places))
    visible, predicted = split_tubes(grid_of(slots, side), slots * shown, torch.tensor([5, 6]))
    by_slot = visible.view(2, slots, shown)
    assert torch.equal(by_slot % places, (by_slot % places)[:, :1].expand_as(by_slot))
    everything = torch.cat([visible, predicted], dim=1).sort(dim=1).values
    assert everything.tolist() == [list(range(slots * places))] * 2
    assert bool((visible.diff(dim=1) > 0).all()) and bool((predicted.diff(dim=1) > 0).all())


@settings(deadline=None)
@given(slots=st.integers(1, 12), side=st.integers(1, 4), data=st.data())
def test_whole_slots_are_evenly_spaced_and_lack_the_surplus_only(
    slots: int, side: int, data: st.DataObject
) -> None:
    num_kept = data.draw(st.integers(1, slots * side**2))
    keep = whole_slots(grid_of(slots, side), num_kept, torch.arange(5))
    assert keep.shape == (5, num_kept) and bool((keep.diff(dim=1) > 0).all())
    count = math.ceil(num_kept / side**2)
    middles = [math.floor((i + 0.5) * slots / count) for i in range(count)]
    for tokens in keep.tolist():
        assert {token // side**2 for token in tokens} <= set(middles)


def test_every_token_of_the_whole_slots_is_equally_often_dropped() -> None:
    draws = 5000
    keep = whole_slots(grid_of(8, 3), 14, torch.arange(draws))  # of the 18 tokens of slots 2 and 6
    assert_equally_often(torch.bincount(keep.flatten() % 36 - 18, minlength=9), 2 * draws, 7)


def running_cells(start: int, num_slots: int, side: int) -> set[int]:
    """Return VideoMAE v2's decoder mask by definition: two of a cell's four places in turn, slot by slot."""
    chosen = set()
    for slot in range(num_slots):
        for row in range(side):
            for column in range(side):
                if (2 * (row % 2) + column % 2 + slot + start) % 4 < 2:
                    chosen.add(slot * side**2 + row * side + column)
    return chosen


@settings(deadline=None)
@given(periods=st.integers(1, 4), side=st.integers(2, 7), mask=st.sampled_from([0.5, 0.75, 0.9]))
def test_dual_masking_predicts_the_hidden_places_under_running_cells(
    periods: int, side: int, mask: float
) -> None:
    geometry = grid_of(4 * periods, side)
    counts = pretrain_counts(geometry, "dual", 0.3, mask)
    keys = torch.arange(6)
    visible, predicted = split_dual(geometry, counts.num_visible, keys)
    assert predicted.shape == (6, counts.num_predicted) and bool((predicted.diff(dim=1) > 0).all())
    for shown, guessed in zip(visible.tolist(), predicted.tolist(), strict=True):
        candidates = [running_cells(start, 4 * periods, side) - set(shown) for start in range(4)]
        assert set(guessed) in candidates


def test_running_cells_start_anywhere() -> None:
    geometry = grid_of(4, 2)
    _, predicted = split_dual(geometry, 0, torch.arange(60))
    assert {tuple(row) for row in predicted.tolist()} == {
        tuple(sorted(running_cells(start, 4, 2))) for start in range(4)
    }


def assert_equally_often(counts: Tensor, draws: int, taken: int) -> None:
    """Check by chi-square, within 5 standard deviations, that `taken` of len(counts) are drawn uniformly."""
    size = len(counts)
    expected = draws * taken / size
    assert counts.sum() == draws * taken
    variance = expected * (1 - taken / size)
    chi_square = ((counts - expected) ** 2).sum().item() / variance * (size - 1) / size
    assert abs(chi_square - (size - 1)) < 5 * math.sqrt(2 * (size - 1))
