"""Tests of the K-centered sampler: its greedy search, the patches that it picks, and their embedding."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.kcenter import (
    KCenterSampler,
    farthest_points,
    patch_positions,
    squared_distances,
)
from everest_ds.efficiency.peers.patches import AllPatches, PatchEmbedding
from everest_ds.models.tubelets import gather_tokens, to_tubelets
from tests.efficiency.peers.real_clips import real_clips
from tests.efficiency.peers.small_peers import LONG, sampler

KEYS = torch.tensor([5, 6])
# Integer coordinates, so that distances are exact and ties are common.
clouds = arrays(np.int64, (8, 2), elements=st.integers(0, 4))


def naive_farthest(points: np.ndarray, first: int, count: int, rivals: list[int]) -> list[int]:
    picks = [first]
    while len(picks) < count:
        free = [i for i in range(len(points)) if rivals[i] not in {rivals[p] for p in picks}]
        picks.append(max(free, key=lambda i: min(((points[i] - points[p]) ** 2).sum() for p in picks)))
    return picks


def radius(points: np.ndarray, picks: tuple[int, ...] | list[int]) -> float:
    """Return the covering radius: the largest distance of a point from its nearest pick."""
    return max(min(float(np.linalg.norm(p - points[i])) for i in picks) for p in points)


@given(cloud=clouds, first=st.integers(0, 7), count=st.integers(1, 4), num_rivals=st.sampled_from([4, 8]))
def test_equal_to_a_loop(cloud: np.ndarray, first: int, count: int, num_rivals: int) -> None:
    rival = torch.arange(8) % num_rivals
    points = torch.from_numpy(cloud).float()[None]
    picks = farthest_points(points, torch.tensor([first]), count, rival)
    assert picks[0].tolist() == naive_farthest(cloud, first, count, rival.tolist())


@given(cloud=clouds, first=st.integers(0, 7))
@settings(max_examples=30)
def test_covers_at_most_twice_as_loosely_as_the_best_choice(cloud: np.ndarray, first: int) -> None:
    picks = farthest_points(torch.from_numpy(cloud).float()[None], torch.tensor([first]), 3, torch.arange(8))
    best = min(radius(cloud, choice) for choice in combinations(range(8), 3))
    assert radius(cloud, picks[0].tolist()) <= 2 * best + 1e-6


def test_searches_do_not_mix() -> None:
    points = torch.rand(3, 20, 5, generator=torch.Generator().manual_seed(0))
    first = torch.tensor([4, 0, 9])
    together = farthest_points(points, first, 6, torch.arange(20))
    for i in range(3):
        alone = farthest_points(points[i : i + 1], first[i : i + 1], 6, torch.arange(20))
        assert torch.equal(together[i], alone[0])


def test_distances_are_not_rounded_to_half_precision() -> None:
    points = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        distances = squared_distances(points)
    torch.testing.assert_close(distances, torch.cdist(points, points).square(), atol=1e-5, rtol=1e-5)


def test_positions_are_as_far_apart_as_released() -> None:
    low, high = patch_positions(ClipGeometry(32, 1)).aminmax(dim=0)
    torch.testing.assert_close(high, torch.tensor([4.0, 8**0.5, 8**0.5]))
    torch.testing.assert_close(low, -high)


def random_patches() -> Tensor:
    shape = (2, LONG.num_tokens, LONG.tubelet_values)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(2)).byte()


@pytest.mark.parametrize("one_per_place", [False, True])
@pytest.mark.parametrize("still", [False, True])
def test_picks_a_frame_of_different_patches_from_each_segment(one_per_place: bool, still: bool) -> None:
    """The picks of a segment are distinct patches, even if all pixels are equal and only positions differ."""
    patches = torch.zeros_like(random_patches()) if still else random_patches()
    picks = sampler(one_per_place)(patches, KEYS)
    places, candidates = LONG.tokens_per_slot, 3 * LONG.tokens_per_slot
    assert picks.shape == (2, 4, places) and picks.dtype == torch.int64
    assert torch.equal(picks // candidates, torch.arange(4)[:, None].expand_as(picks))
    assert all(len(segment.unique()) == places for segment in picks.flatten(0, 1))
    if one_per_place:
        assert torch.equal(picks % places, torch.arange(places).expand_as(picks))
    else:
        assert (picks.diff(dim=-1) > 0).all()


def test_the_first_pick_is_the_keys_alone() -> None:
    patches = random_patches()
    picks = sampler(False)(patches, KEYS)
    for i in range(2):
        assert torch.equal(sampler(False)(patches[i : i + 1], KEYS[i : i + 1])[0], picks[i])
    assert not torch.equal(sampler(False)(patches, KEYS + 1), picks)


def test_a_patch_that_appears_once_is_always_picked() -> None:
    patches = torch.full((1, LONG.num_tokens, LONG.tubelet_values), 100, dtype=torch.uint8)
    odd = [7, 50, 101, 190]  # one patch per segment
    patches[0, odd] = 200
    for key in range(5):
        picks = sampler(False)(patches, torch.tensor([key]))
        assert set(odd) <= set(picks.flatten().tolist())


def test_covers_real_clips_better_than_every_fourth_frame() -> None:
    geometry = ClipGeometry(num_frames=32, tubelet_size=1, image_size=64)
    patches = to_tubelets(real_clips(geometry, "bikes.mp4", "bigbuckbunny.mp4"), geometry)
    ours = KCenterSampler(geometry)(patches, KEYS).flatten(1)
    regular = torch.arange(geometry.num_tokens).unflatten(0, (32, -1))[2::4].flatten().expand(2, -1)

    def worst(chosen_BK: Tensor) -> Tensor:
        distance = torch.cdist(patches.float(), gather_tokens(patches, chosen_BK).float())
        return distance.amin(dim=2).amax(dim=1)

    assert (worst(ours) < 0.9 * worst(regular)).all()


def test_sampled_patches_keep_their_own_place_and_time() -> None:
    torch.manual_seed(0)
    embedding = PatchEmbedding(LONG, 32)
    patches = random_patches()
    _, whole = embedding(patches, AllPatches(LONG)(patches, KEYS))
    picks = sampler(False)(patches, KEYS)
    _, picked = embedding(patches, picks)
    torch.testing.assert_close(picked.flatten(1, 2), gather_tokens(whole.flatten(1, 2), picks.flatten(1)))


def test_segments_must_come_out_even() -> None:
    with pytest.raises(ValueError, match="12 slots do not fill 8 segments"):
        KCenterSampler(LONG, num_segments=8)
