"""The next batch on its way to the device while a step computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.data.augment import Augmentation
from everest_ds.data.clips import Batch, PackedBatch
from everest_ds.data.reading import Failure
from everest_ds.training.packing import unpack


class Ready(NamedTuple):
    """A batch to compute on.

    Attributes:
        batch: on the device, augmented.
        items: int64 (B,) on the host, the samples of its clips.
    """

    batch: Batch
    items: Tensor


class _Held(NamedTuple):
    """A batch that was prepared, or why not, and the samples that could not be read for it."""

    ready: Ready | None
    error: Exception | None
    failures: list[Failure]


class Preparation:
    """Everything that becomes of a loader's batch before a model sees it."""

    def __init__(self, config: Experiment, device: torch.device) -> None:
        self._device = device
        self._geometry = config.model.geometry
        self._augment = Augmentation(config)

    def __call__(self, batch: Batch) -> Batch:
        """Move a batch to the device without waiting, and unpack or augment it there.

        Augmentation writes into clips that are on the device already.
        """
        here = batch.to(self._device)
        if isinstance(here, PackedBatch):
            return unpack(here, self._geometry)
        return self._augment(here, batch.key.tolist())


class Prefetcher:
    """Batches in their order, each copied and augmented by a `fetch` during the step before its own.

    On a GPU that happens on a stream of its own, beside the step. A CPU takes the same path without one.
    Whatever fails on the way belongs to the step that takes the batch, and is raised there.

    Args:
        batches: on the host, in pinned memory for a GPU. None beyond `num_batches` is asked for.
        failures: where `batches` notes samples that could not be read.
        on_failure: told of each of them when its batch is taken.
        prepare: moves a batch to the device without waiting, and augments it.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        num_batches: int,
        failures: list[Failure],
        on_failure: Callable[[Failure], None],
        prepare: Callable[[Batch], Batch],
        device: torch.device,
    ) -> None:
        self._batches = batches
        self._num_left = num_batches
        self._failures = failures
        self._on_failure = on_failure
        self._prepare = prepare
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._held: _Held | None = None

    def fetch(self) -> None:
        """Prepare the next batch, if there is one. On a GPU, call it when much of a step is launched."""
        if self._num_left:
            self._held = self._next()

    def take(self) -> Ready:
        """Return the next batch.

        Raises:
            DataError: its clips could not be read, or whatever else kept it from being prepared.
        """
        held, self._held = self._held or self._next(), None
        for failure in held.failures:
            self._on_failure(failure)
        if held.ready is None:
            assert held.error is not None
            raise held.error
        self._hand_over(held.ready.batch)
        return held.ready

    def _next(self) -> _Held:
        self._num_left -= 1
        ready, error = None, None
        try:
            batch = next(self._batches)
            with self._beside():
                ready = Ready(self._prepare(batch), batch.item)
        except Exception as failure:  # raised by `take`
            error = failure
        noted = self._failures.copy()
        self._failures.clear()
        return _Held(ready, error, noted)

    def _beside(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _hand_over(self, batch: Batch) -> None:
        """Let the stream of the step wait for the batch, and keep its memory until that has used it."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in batch:
            tensor.record_stream(current)
