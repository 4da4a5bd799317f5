"""Tests of Run-Length Tokenization at a fixed number of tokens, against a naive loop over pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.selection.rero import select_tokens
from everest_ds.models.selection.run_length import run_change
from everest_ds.models.tubelets import PIXEL_MEAN, PIXEL_STD, to_tubelets
from tests.models import experiment


def naive_change(clip: np.ndarray, geometry: ClipGeometry, token: int) -> float:
    """Compute the mean absolute change from the first frame of the slot before to the last of this slot."""
    slot, place = divmod(token, geometry.tokens_per_slot)
    if slot == 0:
        return float("inf")
    row, column = (geometry.patch_size * i for i in divmod(place, geometry.grid_size))
    size, t = geometry.patch_size, geometry.tubelet_size
    normalized = (clip / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
    patches = normalized[:, row : row + size, column : column + size]
    return float(np.abs(patches[(slot + 1) * t - 1] - patches[(slot - 1) * t]).mean())


@settings(deadline=None, max_examples=40)
@given(
    slots=st.integers(1, 6),
    tubelet_size=st.integers(1, 3),
    side=st.integers(1, 3),
    levels=st.sampled_from([2, 256]),
    seed=st.integers(0, 2**31),
)
def test_change_equals_a_naive_loop(slots: int, tubelet_size: int, side: int, levels: int, seed: int) -> None:
    geometry = ClipGeometry(slots * tubelet_size, tubelet_size, 4 * side, 4)
    clip = np.random.default_rng(seed).integers(0, levels, (geometry.num_frames, 4 * side, 4 * side, 3))
    change = run_change(to_tubelets(torch.from_numpy(clip[None]).byte(), geometry), geometry)
    expected = [naive_change(clip, geometry, token) for token in range(geometry.num_tokens)]
    torch.testing.assert_close(change, torch.tensor([expected]), rtol=1e-5, atol=0)


def test_the_kept_tokens_are_those_above_a_threshold_of_the_clip() -> None:
    """Some threshold gives RLT exactly the kept tokens, because no two changes of this clip are equal."""
    geometry = ClipGeometry(8, 2, 16, 4)
    clip = np.random.default_rng(3).integers(0, 256, (8, 16, 16, 3))
    keep = select_tokens(run_change(to_tubelets(torch.from_numpy(clip[None]).byte(), geometry), geometry), 30)
    changes = [naive_change(clip, geometry, token) for token in range(geometry.num_tokens)]
    threshold = sorted(changes)[-31]
    assert keep[0].tolist() == [token for token, change in enumerate(changes) if change > threshold]


def test_fewer_tokens_than_the_first_slot_holds_are_refused() -> None:
    with pytest.raises(ValidationError, match="keeps all 16 tokens of 1 slot, but .* use at least 0.25"):
        experiment("finetune", "rlt", keep_ratio=0.2)
    assert experiment("finetune", "rlt", keep_ratio=0.25).token_counts.num_kept == 16
