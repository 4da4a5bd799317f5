"""Frame sampling: the choice of the frames of a video that make up a clip."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from everest_ds.config import DataConfig
from everest_ds.errors import DataError

Indices = list[int]


class TooShortError(DataError):
    """Error for an intact video that is too short for the requested clip."""


@dataclass(frozen=True)
class ClipFrames:
    """The rule that chooses the frames of a clip from a video.

    Attributes:
        num_frames: frames per clip.
        stride: distance between consecutive frames of a clip if `sampling` is `stride`, in video frames.
        sampling: `stride` takes frames `stride` apart; `segments` takes one frame from each of `num_frames`
            equal parts of the video (TSN's sampling, which VideoMAE uses on SSv2).
        hold_last_frame: repeat the last frame of a video that is too short, as VideoMAE's loader does;
            otherwise the video is refused.
    """

    num_frames: int
    stride: int
    sampling: str
    hold_last_frame: bool

    @classmethod
    def of(cls, num_frames: int, data: DataConfig) -> ClipFrames:
        """Build the rule that the config section `data` describes."""
        return cls(num_frames, data.frame_stride, data.sampling, data.short_videos == "hold_last_frame")

    @property
    def needed(self) -> int:
        """Length of the shortest video that a clip can be cut from, in frames."""
        if self.hold_last_frame:
            return 1
        return self._span if self.sampling == "stride" else self.num_frames

    def for_training(self, video_frames: int, rng: np.random.Generator) -> Indices:
        """Draw the frames of a random clip: from a uniform random start, or one random frame per segment.

        Raises:
            TooShortError: if the video has fewer than `needed` frames.
        """
        self._check(video_frames)
        if self.sampling == "segments":
            return self._from_segments(video_frames, rng.random(self.num_frames))
        return self._from(int(rng.integers(self._room(video_frames) + 1)), video_frames)

    def for_view(self, video_frames: int, view: int, num_views: int) -> Indices:
        """Return the frames of temporal view `view` of `num_views` spread evenly; a single view is centred.

        Raises:
            TooShortError: if the video has fewer than `needed` frames.
        """
        self._check(video_frames)
        if self.sampling == "segments":
            return self._from_segments(video_frames, np.full(self.num_frames, (view + 0.5) / num_views))
        place = view / (num_views - 1) if num_views > 1 else 0.5
        return self._from(round(self._room(video_frames) * place), video_frames)

    @property
    def _span(self) -> int:
        return (self.num_frames - 1) * self.stride + 1

    def _room(self, video_frames: int) -> int:
        """Return the last frame at which a clip can start."""
        return max(video_frames - self._span, 0)

    def _from(self, start: int, video_frames: int) -> Indices:
        return [min(start + i * self.stride, video_frames - 1) for i in range(self.num_frames)]

    def _from_segments(self, video_frames: int, offset: np.ndarray) -> Indices:
        edges = np.linspace(0, video_frames, self.num_frames + 1)
        chosen = np.floor(edges[:-1] + offset * np.diff(edges)).astype(int)
        return [int(i) for i in np.minimum(chosen, video_frames - 1)]

    def _check(self, video_frames: int) -> None:
        if video_frames >= self.needed:
            return
        by_stride = f" ({self.num_frames} frames at stride {self.stride})"
        raise TooShortError(
            "video too short for a clip",
            given=f"{video_frames} frames",
            allowed=f"at least {self.needed}" + (by_stride if self.sampling == "stride" else ""),
            fix="data.short_videos=hold_last_frame repeats the last frame, as VideoMAE does; or lower"
            " data.frame_stride or model.num_frames",
        )
