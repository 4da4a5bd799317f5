"""Tests of the estimate of the camera's motion in `tools/study`, against known shifts and a naive loop."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
import torch
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.tubelets import from_tubelets, to_tubelets

GEOMETRY = ClipGeometry(num_frames=6, image_size=48, patch_size=8)


def panned(down: int, right: int, object_side: int = 0) -> Tensor:
    """Return frames (F, H, W, 3) of a texture that moves evenly, behind a square that moves the other way."""
    scene = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    frames = np.stack([np.roll(scene, (i * down, i * right), (0, 1))[30:78, 30:78] for i in range(6)])
    if object_side:
        for i, frame in enumerate(frames):
            frame[10 : 10 + object_side, 8 + 2 * i : 8 + 2 * i + object_side] = scene[
                :object_side, :object_side
            ]
    return torch.from_numpy(frames)


@pytest.mark.parametrize("down, right", [(0, 0), (1, 0), (-2, 3), (3, -1)])
def test_the_dominant_shift_is_found_behind_a_moving_object(down: int, right: int) -> None:
    camera = import_module("study.camera")
    clip = panned(down, right, object_side=16)
    shift = camera.camera_shift(clip[None, ::2, :, :, 1].float(), GEOMETRY.grid_size)
    assert shift.tolist() == [[[2 * down, 2 * right]] * 2]


def test_a_moving_object_before_a_still_background_is_no_camera() -> None:
    camera = import_module("study.camera")
    still = panned(0, 0, object_side=20)
    assert not camera.camera_shift(still[None, ::2, :, :, 1].float(), GEOMETRY.grid_size).any()
    tubelets = to_tubelets(still[None], GEOMETRY)
    assert torch.equal(camera.predecessors(tubelets, GEOMETRY), tubelets[:, : -GEOMETRY.tokens_per_slot])


def test_predecessors_are_the_pixels_that_the_camera_has_moved() -> None:
    camera = import_module("study.camera")
    clip = panned(-2, 3)
    before = camera.predecessors(to_tubelets(clip[None], GEOMETRY), GEOMETRY)
    shown = from_tubelets(before, ClipGeometry(num_frames=4, image_size=48, patch_size=8))[0]
    for frame, row, column in np.ndindex(4, 48, 48):
        source = min(max(row + 4, 0), 47), min(max(column - 6, 0), 47)
        assert torch.equal(shown[frame, row, column], clip[frame][source])
    assert torch.equal(shown[:, :44, 6:], clip[2:, :44, 6:])
