"""Reading of a sample's frames despite damaged files, unreliable storage and crashing decoders.

A read that fails is tried once more. If it fails again, the caller receives the reason and reports it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from everest_ds.config import DataConfig
from everest_ds.data.decoding.open_video import open_sample
from everest_ds.data.decoding.video import Need, NoMotionError, Pictures, Size
from everest_ds.data.frames import TooShortError
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError

T = TypeVar("T")

_ATTEMPTS = 2
_PAUSE_S = 0.1  # before the next attempt: gives network storage time to fail over to another path


class DamagedCopyError(DataError):
    """Error for a sample of which a copy is damaged that was made to be read faster."""


class Failure(NamedTuple):
    """A sample that could not be read.

    Attributes:
        epoch: epoch of the read; 0 in evaluation.
        slot: index of the sample that the epoch's order names, either `sample` or the one that it replaces.
        sample: index of the sample that could not be read.
        reason: what is wrong with it.
        damaged: False if the video is intact: it is only too short for this clip, has no motion vectors for
            the codec score, or its copy in a token cache is damaged.
    """

    epoch: int
    slot: int
    sample: int
    reason: str
    damaged: bool

    @classmethod
    def of(cls, error: DataError, *, epoch: int, slot: int, sample: int) -> Failure:
        """Describe the failure of reading `sample` that `error` reports."""
        intact = isinstance(error, (TooShortError, NoMotionError, DamagedCopyError))
        return cls(epoch, slot, sample, str(error), not intact)


class SampleReader:
    """A reader of the frames of samples, which retries once and refuses samples that crashed a decoder.

    Attributes:
        samples: the samples of the manifest.
        data: the data config.
        given_up: reasons by sample index for samples that crashed or hung a decoder and are not read again.
        with_motion: whether pictures come with their motion.
        watch: called with the index of the sample before each read, and with None after it.
    """

    def __init__(self, samples: Sequence[Sample], data: DataConfig, with_motion: bool = False) -> None:
        self.samples = samples
        self.data = data
        self.with_motion = with_motion
        self.given_up: dict[int, str] = {}
        self.watch: Callable[[int | None], None] = lambda index: None

    def read(self, index: int, choose: Callable[[int], list[int]], need: Callable[[Size], Need]) -> Pictures:
        """Read the frames of sample `index` that `choose` selects.

        Args:
            index: index of the sample in the manifest.
            choose: maps the video's number of frames to the wanted indices; called once per attempt.
            need: maps the size of the video's pictures to the part of them that is needed.

        Raises:
            DataError: if the sample cannot be read or is too short; the message does not name the file.
        """

        def pictures() -> Pictures:
            with open_sample(self.samples[index], self.data, self.with_motion) as video:
                return video.read_needed(choose(video.num_frames), need)

        return self.attempt(index, pictures)

    def attempt(self, index: int, read: Callable[[], T]) -> T:
        """Call `read`, which reads sample `index`, twice if the first call fails.

        Raises:
            DataError: if both calls fail, or the sample is too short; the message does not name the file.
        """
        if index in self.given_up:
            raise DataError(self.given_up[index])
        reason = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_S)
            self.watch(index)
            try:
                return read()
            except (TooShortError, NoMotionError):
                raise
            except (DataError, OSError) as error:
                reason = str(error)
            finally:
                self.watch(None)
        raise DataError(reason.removeprefix(f"{self.samples[index].path}: "))
