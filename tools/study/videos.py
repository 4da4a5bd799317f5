"""Videos in memory, with the motion vectors of their files or the true motion of the scene.

Shape legend: F frames, H x W pixels, T slots, G x G places of a slot, N = T·G·G tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

from everest_ds.config import DataConfig
from everest_ds.config.tokens import ClipGeometry
from everest_ds.data import reading
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.decoding.video import Motion, Need, Pictures, Size, Video
from everest_ds.data.synthetic import MOTIONS, SyntheticSpec, object_cover, video_generator
from everest_ds.data.video_list import Sample
from everest_ds.models.selection import packer
from everest_ds.models.selection.codec import codec_importance
from everest_ds.models.selection.rero import token_importance
from everest_ds.models.tubelets import to_tubelets
from study.camera import predecessors

RANKINGS = ("motion", "camera")  # the true motion of the scene; the change of pixels less the camera's motion

_scene: SyntheticSpec | None = None  # of the videos whose true motion is handed out


def keep_videos_in_memory() -> None:
    """Make this process decode every video once, because decoding takes as long as training on it."""
    # The trainer opens videos only through this function.
    reading.open_sample = lambda sample, data, with_motion=False: _HeldVideo(sample, data)


@contextmanager
def ranked_by(ranking: str | None, scene: SyntheticSpec) -> Iterator[None]:
    """Within the context, rank tokens by one of `RANKINGS` wherever the codec score is asked for.

    Args:
        ranking: the ranking; None leaves the codec score.
        scene: spec of the videos, at the size of the clips, whose true motion `motion` ranks by.
    """
    global _scene
    if ranking == "motion":
        _scene, packer.codec_importance = scene, _moving_area
    elif ranking == "camera":
        packer.codec_importance = change_without_camera
    try:
        yield
    finally:
        _scene, packer.codec_importance = None, codec_importance


class _HeldVideo(Video):
    """A video in memory."""

    def __init__(self, sample: Sample, data: DataConfig) -> None:
        self.path = sample.path
        self._held = _decoded(sample, data.decode_short_side)
        self.num_frames = len(self._held.pixels)

    def close(self) -> None:
        """Do nothing: no file is open."""

    def read_needed(self, indices: Sequence[int], need: Callable[[Size], Need]) -> Pictures:
        """Return the whole pictures `indices` with their motion."""
        motion = (
            self._held.motion if _scene is None else _motion_of(self.path.parent.name, self.path.stem, _scene)
        )
        if motion is not None:
            motion = motion._replace(speed=motion.speed[list(indices)], number=motion.number[list(indices)])
        return self._held._replace(pixels=self._read(indices), motion=motion)

    def _read(self, indices: Sequence[int]) -> Tensor:
        return self._held.pixels[list(indices)]


@cache
def _decoded(sample: Sample, short_side: int | None) -> Pictures:
    data = DataConfig(decode_short_side=short_side)
    with open_sample(sample, data, with_motion=sample.stored is None) as video:
        return video.read_needed(range(video.num_frames), whole_picture)


def whole_picture(size: Size) -> Need:
    """Return the need of whole pictures."""
    return Need(range(size.height), range(size.width), 1)


@cache
def _motion_of(split: str, name: str, scene: SyntheticSpec) -> Motion:
    """Return as motion the share of each pixel that the object covers, in the frames in which it moves."""
    index = int(name)
    cover_FHW = object_cover(index % len(MOTIONS), video_generator(scene, split, index), scene)
    moves_F = (np.diff(cover_FHW, axis=0) != 0).any(axis=(1, 2))
    speed_FHW = cover_FHW * np.append(moves_F[:1], moves_F)[:, None, None]
    return Motion(np.stack([speed_FHW, np.zeros_like(speed_FHW)], axis=-1), np.arange(len(cover_FHW)), cell=1)


def change_without_camera(clip_FHWC: Tensor, moved_TGG2: Tensor, geometry: ClipGeometry) -> Tensor:
    """Return the change of the pixels that the camera does not explain, in place of `codec_importance`."""
    places = geometry.tokens_per_slot
    tubelets_1NP = to_tubelets(clip_FHWC[None], geometry)
    before_SLP = predecessors(tubelets_1NP, geometry)[0].unflatten(0, (-1, places))
    here_SLP = tubelets_1NP[0, places:].unflatten(0, (-1, places))
    pairs = torch.cat([before_SLP, here_SLP], dim=1)  # clips of two slots
    change_SL = token_importance(pairs, 2, None, "l2")[:, places:]
    return torch.cat([change_SL[:1], change_SL]).flatten()


def _moving_area(clip_FHWC: Tensor, moved_TGG2: Tensor, geometry: ClipGeometry) -> Tensor:
    """Return how much moving object each token holds, in place of `codec_importance`: float32 (N,)."""
    return moved_TGG2.abs().sum(dim=-1).flatten().to(torch.float32)
