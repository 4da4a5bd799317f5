"""Tests of the table of selection rules: the token counts of the published settings."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.config.selections import classify_counts, pretrain_counts
from everest_ds.config.tokens import ClipGeometry

CLIP = ClipGeometry()  # 16 frames at 224 x 224 pixels: 8 slots of 196 tokens


@pytest.mark.parametrize(("keep_ratio", "kept"), [(0.3, 470), (0.4, 627), (1.0, 1568)])
def test_pretraining_counts_of_everest(keep_ratio: float, kept: int) -> None:
    counts = pretrain_counts(CLIP, "rero", keep_ratio, mask_ratio=0.9)
    assert (counts.num_tokens, counts.num_kept, counts.num_visible) == (1568, kept, 156)
    assert counts.num_predicted == kept - 156


def test_pretraining_counts_of_videomae_v2() -> None:
    """VideoMAE v2 predicts half of the 8·176 hidden tokens."""
    counts = pretrain_counts(CLIP, "dual", keep_ratio=0.3, mask_ratio=0.9)
    assert (counts.num_kept, counts.num_visible, counts.num_predicted) == (864, 160, 704)


def test_counts_of_the_controls() -> None:
    random, rero = (pretrain_counts(CLIP, s, keep_ratio=0.3, mask_ratio=0.9) for s in ("random", "rero"))
    everything = pretrain_counts(CLIP, "none", keep_ratio=0.3, mask_ratio=0.9)
    assert random == rero
    assert (everything.num_kept, everything.num_visible) == (1568, 156)


def test_pretraining_counts_of_videomae() -> None:
    counts = pretrain_counts(CLIP, "tube", keep_ratio=0.3, mask_ratio=0.9)
    assert (counts.num_kept, counts.num_visible, counts.num_predicted) == (1568, 160, 1408)


@pytest.mark.parametrize(
    ("selection", "kept"), [("rero", 940), ("rlt", 940), ("uniform", 940), ("tube", 8 * 117), ("none", 1568)]
)
def test_finetuning_counts(selection: str, kept: int) -> None:
    counts = classify_counts(CLIP, selection, keep_ratio=0.6)
    assert (counts.num_kept, counts.num_visible, counts.num_predicted) == (kept, kept, 0)


@given(
    slots=st.integers(1, 16),
    grid=st.integers(1, 20),
    thousandths=st.integers(0, 999),
    selection=st.sampled_from(["rero", "tube"]),
)
def test_hidden_share_is_at_least_the_mask_ratio(
    slots: int, grid: int, thousandths: int, selection: str
) -> None:
    """The visible tokens are (1 - mask)·N, rounded down for `rero` and up to whole tubes for `tube`."""
    geometry = ClipGeometry(2 * slots, 2, 16 * grid, 16)
    mask_ratio = thousandths / 1000
    counts = pretrain_counts(geometry, selection, 1.0, mask_ratio)
    exact = (1 - Decimal(thousandths).scaleb(-3)) * geometry.num_tokens
    if selection == "rero":
        assert exact - 1 < counts.num_visible <= exact
    else:
        assert counts.num_visible % slots == 0
        assert exact <= counts.num_visible < exact + slots
