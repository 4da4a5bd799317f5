"""The part of the loader that runs in a worker: reading of clips, and their joining into a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import default_collate

from everest_ds.data.batch_memory import BatchMemory
from everest_ds.data.loader_errors import Failed, failed_item, failed_join
from everest_ds.data.reading import Failure, SampleReader

NewClip = Callable[[tuple[int, ...]], Tensor]


class Pack(Protocol):
    """The selection of a clip's tokens in a worker.

    Attributes:
        keeps_clips: True if clips stay whole; otherwise they are replaced by their kept tubelets.
    """

    keeps_clips: bool

    def __call__(self, clip: Tensor, moved: Tensor | None, /) -> tuple[Tensor, Tensor]:
        """Map a clip (F, H, W, 3) and its motion, if the score needs it, to the clip or its tubelets (K, P).

        Returns:
            The clip or its kept tubelets, and the indices of their tokens (K,).
        """
        ...


class LoadedItem(NamedTuple):
    """The result of reading one item, or of a batch of items.

    Attributes:
        clips: a list of clips for one item; the stacked clips for a batch.
        failures: samples that could not be read in the process.
    """

    clips: Any
    failures: list[Failure]


def new_clip(shape: tuple[int, ...]) -> Tensor:
    """Return new memory for a clip: an uninitialised uint8 tensor."""
    return torch.empty(shape, dtype=torch.uint8)


class ClipSource(Protocol):
    """A data set whose items are read by a `SampleReader`.

    Attributes:
        new_clip: returns a uint8 tensor of the given shape, to put a clip into.
    """

    reader: SampleReader
    new_clip: NewClip

    def __getitem__(self, item: Any) -> LoadedItem: ...

    def name_of(self, item: Any) -> str:
        """Return the name of the item's sample, for messages."""
        ...


class GuardedSource:
    """A wrapper of a source that returns errors as values: raised in a worker, they would arrive as text.

    Attributes:
        memory: the memory of this worker, in which it joins batches; None in the rank itself.
    """

    def __init__(self, source: ClipSource) -> None:
        self.source = source
        self.memory: BatchMemory | None = None

    def __getitem__(self, item: object) -> LoadedItem | Failed:
        try:
            return self.source[item]
        except Exception as error:
            return failed_item(self.source.name_of(item), error)

    def joined(self, items: list[LoadedItem | Failed]) -> LoadedItem | Failed:
        """Join the clips of items into a batch, or return the first error among the items."""
        try:
            return self._joined(items)
        except Exception as error:
            return failed_join(error)
        finally:
            if self.memory is not None:
                self.memory.end_batch()

    def _joined(self, items: list[LoadedItem | Failed]) -> LoadedItem | Failed:
        clips: list[Any] = []
        failures: list[Failure] = []
        for item in items:
            if isinstance(item, Failed):
                return item
            clips += item.clips
            failures += item.failures
        join = default_collate if self.memory is None else self.memory.joined
        return LoadedItem(join(clips), failures)
