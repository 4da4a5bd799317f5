"""Tests of the motion of tubelets against a naive loop over pixels: crop, resize, flip, and gaps in time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from everest_ds.config.tokens import ClipGeometry
from everest_ds.data.decoding.video import Motion
from everest_ds.data.transforms import Box, crop_motion

GEOMETRY = ClipGeometry(num_frames=4, image_size=24, patch_size=8)


def naive_moved(motion: Motion, box: Box, flip: bool) -> np.ndarray:
    """Average the speed over many points of each patch, and multiply it by the time since the slot before."""
    grid, size, points = GEOMETRY.grid_size, GEOMETRY.image_size, 200
    moved = np.zeros((2, grid, grid, 2))
    passed = motion.number[2] - motion.number[0]
    for slot, row, column in np.ndindex(2, grid, grid):
        rows = box.top + (row + (np.arange(points) + 0.5) / points) * box.height / grid
        columns = box.left + (column + (np.arange(points) + 0.5) / points) * box.width / grid
        down = ((rows - motion.top) // motion.cell).astype(int)
        right = ((columns - motion.left) // motion.cell).astype(int)
        speed = motion.speed[2 * slot : 2 * slot + 2].mean(axis=0)[down][:, right].mean(axis=(0, 1))
        place = (slot, row, grid - 1 - column) if flip else (slot, row, column)
        moved[place] = speed * passed * (size / box.height, (-size if flip else size) / box.width)
    return moved


@settings(max_examples=25, deadline=None)
@given(
    top=st.integers(0, 30),
    left=st.integers(0, 40),
    height=st.integers(8, 66),
    width=st.integers(8, 56),
    cell=st.sampled_from([16.0, 12.5]),
    offset=st.sampled_from([0.0, -7.0]),
    flip=st.booleans(),
    seed=st.integers(0, 9),
)
def test_motion_is_averaged_over_each_patch_of_the_crop(
    top: int, left: int, height: int, width: int, cell: float, offset: float, flip: bool, seed: int
) -> None:
    speed = np.random.default_rng(seed).normal(size=(4, 9, 9, 2)).astype(np.float32)
    motion = Motion(speed, np.array([5, 6, 11, 12]), cell, offset, offset)
    box = Box(top, left, height, width)
    np.testing.assert_allclose(
        crop_motion(motion, box, GEOMETRY, flip), naive_moved(motion, box, flip), atol=0.12
    )


def test_the_first_slot_takes_the_time_to_the_second() -> None:
    motion = Motion(np.ones((4, 2, 2, 2), np.float32), np.array([0, 1, 8, 9]), 16.0)
    moved = crop_motion(motion, Box(0, 0, 24, 24), GEOMETRY)
    assert moved.shape == (2, 3, 3, 2)
    np.testing.assert_allclose(moved, 8.0, rtol=1e-6)
