"""Tests of the HOG targets, against histograms computed pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.hog import hog_targets, hog_width, oriented_gradients
from everest_ds.models.tubelets import normalize_pixels
from tests.efficiency.peers.real_clips import real_clips

GEOMETRY = ClipGeometry(num_frames=4, tubelet_size=2, image_size=32, patch_size=16)


def naive_histograms(picture: np.ndarray) -> np.ndarray:
    """Compute the histograms one pixel at a time: (H, W) -> (H / 8, W / 8, 9)."""
    num_bins, cell = 9, 8
    height, width = picture.shape

    def at(row: int, column: int) -> float:
        return float(picture[min(max(row, 0), height - 1), min(max(column, 0), width - 1)])

    histograms = np.zeros((height // cell, width // cell, num_bins))
    for r in range(height):
        for c in range(width):
            dx = sum(w * (at(r + i, c + 1) - at(r + i, c - 1)) for i, w in ((-1, 1), (0, 2), (1, 1)))
            dy = sum(w * (at(r + 1, c + i) - at(r - 1, c + i)) for i, w in ((-1, 1), (0, 2), (1, 1)))
            for b in range(num_bins):  # a vote falls linearly to 0 at the next bin, 20 degrees away
                angle = abs(math.atan2(dy, dx) - b * math.pi / num_bins) % math.pi
                share = max(0.0, 1 - min(angle, math.pi - angle) / (math.pi / num_bins))
                histograms[r // cell, c // cell, b] += math.hypot(dx, dy) * share / cell**2
    return histograms


# Few grey levels, so that flat areas and axis-aligned edges, whose angle is exactly a bin's, are common.
pictures = st.one_of(
    arrays(np.float32, (16, 8), elements=st.integers(0, 3).map(float)),
    arrays(np.float32, (8, 16), elements=st.integers(0, 255).map(float)),
)


@given(picture=pictures)
@settings(max_examples=25)
def test_equal_to_a_loop_over_pixels(picture: np.ndarray) -> None:
    ours = oriented_gradients(torch.from_numpy(picture)[None])[0]
    np.testing.assert_allclose(ours, naive_histograms(picture), rtol=1e-4, atol=1e-3)


def test_an_upright_edge_votes_for_the_first_bin_alone() -> None:
    edge = torch.zeros(1, 8, 8)
    edge[..., 4:] = 1.0
    # In 2 of 8 columns, the Sobel weights 1 + 2 + 1 meet the step of 1.
    assert oriented_gradients(edge).flatten().tolist() == [4 * 2 / 8, *[0.0] * 8]


def test_all_of_a_gradient_is_shared_out() -> None:
    """The votes of a plane that rises by 1 per row and 3 per column sum to its gradient times Sobel's 8."""
    row, column = torch.arange(24.0)[:, None], torch.arange(24.0)
    inner_cell = oriented_gradients((row + 3 * column)[None])[0, 1, 1]
    assert inner_cell.sum().item() == pytest.approx(8 * math.hypot(1, 3))
    assert inner_cell.count_nonzero() == 2


def check_layout(clip_BFHWC: Tensor) -> None:
    targets = hog_targets(clip_BFHWC, GEOMETRY).unflatten(-1, (3, 9, 2, 2))
    frames = normalize_pixels(clip_BFHWC)
    for slot, row, column, colour in np.ndindex(2, 2, 2, 3):
        cells = oriented_gradients(frames[:, 2 * slot + 1, :, :, colour])
        expected = cells[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].permute(0, 3, 1, 2)
        torch.testing.assert_close(targets[:, 4 * slot + 2 * row + column, colour], expected)


def test_a_token_has_the_cells_of_its_patch_in_the_second_frame() -> None:
    clip = torch.randint(0, 256, (2, 4, 32, 32, 3), generator=torch.Generator().manual_seed(1))
    check_layout(clip.byte())


def test_targets_of_real_clips() -> None:
    clips = real_clips(GEOMETRY, "bikes.mp4", "bigbuckbunny.mp4")
    check_layout(clips)
    targets = hog_targets(clips, GEOMETRY)
    assert targets.shape == (2, GEOMETRY.num_tokens, 108) and hog_width(GEOMETRY) == 108
    assert targets.isfinite().all() and targets.min() >= 0 and targets.any(dim=-1).all()
