"""Which frames of a video make a clip."""

from __future__ import annotations

import numpy as np

from everest_ds.errors import DataError

Indices = list[int]


class TooShortError(DataError):
    """A video from which no such clip can be cut; there is nothing wrong with the file."""


def train_frames(
    video_frames: int, num_frames: int, stride: int, sampling: str, rng: np.random.Generator
) -> Indices:
    """Frame indices of one random training clip.

    `stride`: consecutive frames `stride` apart from a uniform random start. `segments`: one uniform random
    frame from each of `num_frames` equal parts of the video (TSN sampling, as VideoMAE does on SSv2).
    """
    _check_length(video_frames, num_frames, stride, sampling)
    if sampling == "stride":
        start = int(rng.integers(video_frames - _span(num_frames, stride) + 1))
        return list(range(start, start + _span(num_frames, stride), stride))
    return _from_segments(video_frames, num_frames, rng.random(num_frames))


def view_frames(
    video_frames: int, num_frames: int, stride: int, sampling: str, view: int, num_views: int
) -> Indices:
    """Frame indices of temporal view `view` of `num_views`, spread evenly; one view is the middle one."""
    _check_length(video_frames, num_frames, stride, sampling)
    if sampling == "segments":
        return _from_segments(video_frames, num_frames, np.full(num_frames, (view + 0.5) / num_views))
    room = video_frames - _span(num_frames, stride)
    start = round(room * (view / (num_views - 1) if num_views > 1 else 0.5))
    return list(range(start, start + _span(num_frames, stride), stride))


def frames_needed(num_frames: int, stride: int, sampling: str) -> int:
    """The shortest video that a clip can be cut from, in frames."""
    return _span(num_frames, stride) if sampling == "stride" else num_frames


def _span(num_frames: int, stride: int) -> int:
    return (num_frames - 1) * stride + 1


def _from_segments(video_frames: int, num_frames: int, offset: np.ndarray) -> Indices:
    edges = np.linspace(0, video_frames, num_frames + 1)
    chosen = np.floor(edges[:-1] + offset * np.diff(edges)).astype(int)
    return [int(i) for i in np.minimum(chosen, video_frames - 1)]


def _check_length(video_frames: int, num_frames: int, stride: int, sampling: str) -> None:
    needed = frames_needed(num_frames, stride, sampling)
    if video_frames < needed:
        raise TooShortError(
            "video too short for a clip",
            given=f"{video_frames} frames",
            allowed=f"at least {needed} ({num_frames} frames at stride {stride})"
            if sampling == "stride"
            else f"at least {needed}",
            fix="lower data.frame_stride or model.num_frames, or take the video out of the manifest",
        )
