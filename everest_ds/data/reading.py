"""Reading a sample's frames where files may be damaged, storage may stumble, and decoders may crash.

A read that fails is tried once more. What fails twice is reported, with its reason, by whoever asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from everest_ds.config import DataConfig
from everest_ds.data.decode import open_sample
from everest_ds.data.frames import TooShortError
from everest_ds.data.manifest import Sample
from everest_ds.errors import DataError

_ATTEMPTS = 2
_PAUSE_S = 0.1  # before the next attempt: what network storage needs to find another path


class Failure(NamedTuple):
    """A sample that could not be read.

    Attributes:
        epoch: when; 0 in evaluation.
        slot: the sample whose place in the epoch it is, itself or the one that it was to stand in for.
        sample: which.
        reason: what is wrong with it.
        damaged: False: it is only too short for this clip.
    """

    epoch: int
    slot: int
    sample: int
    reason: str
    damaged: bool

    @classmethod
    def of(cls, error: DataError, *, epoch: int, slot: int, sample: int) -> Failure:
        """What became of reading `sample`."""
        return cls(epoch, slot, sample, str(error), not isinstance(error, TooShortError))


class SampleReader:
    """Reads frames of samples.

    Attributes:
        given_up: samples that are not touched again, and why: they have crashed or hung a decoder.
        watch: told which sample is being read, and None when that has ended.
    """

    def __init__(self, samples: Sequence[Sample], data: DataConfig) -> None:
        self.samples = samples
        self.data = data
        self.given_up: dict[int, str] = {}
        self.watch: Callable[[int | None], None] = lambda index: None

    def read(self, index: int, choose: Callable[[int], list[int]]) -> Tensor:
        """Frames of sample `index`: uint8 (len(choose(...)), H, W, 3).

        Args:
            choose: from the number of frames that the video has to those that are wanted; called once a try.

        Raises:
            DataError: it cannot be read, or is too short; the message does not repeat the file.
        """
        if index in self.given_up:
            raise DataError(self.given_up[index])
        reason = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE_S)
            self.watch(index)
            try:
                with open_sample(self.samples[index], self.data) as video:
                    return video.read(choose(video.num_frames))
            except TooShortError:
                raise
            except (DataError, OSError) as error:
                reason = str(error)
            finally:
                self.watch(None)
        raise DataError(reason.removeprefix(f"{self.samples[index].path}: "))
