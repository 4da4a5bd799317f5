"""Clips of the real videos, cropped to a geometry; tests that need them are skipped if there are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.data.decoding.open_video import open_video
from everest_ds.data.transforms import crop_resize, view_box
from tests.data.conftest import REAL_VIDEOS


def real_clips(geometry: ClipGeometry, *names: str) -> Tensor:
    """Read every fourth frame from the start of each named video: uint8 (B, F, H, W, 3)."""
    if not REAL_VIDEOS.is_dir():
        pytest.skip(f"needs the real clips in {REAL_VIDEOS}")
    return torch.stack([_clip(geometry, name) for name in names])


def _clip(geometry: ClipGeometry, name: str) -> Tensor:
    with open_video(REAL_VIDEOS / name) as video:
        clip = video.read(range(0, 4 * geometry.num_frames, 4))
    height, width = clip.shape[1:3]
    return crop_resize(clip, view_box(height, width, 0, 1), geometry.image_size)
