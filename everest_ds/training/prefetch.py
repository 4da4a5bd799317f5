"""Prefetching: the next batch is copied to the device and augmented while a step computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch

from everest_ds.config import Experiment
from everest_ds.data.augment import Augmentation
from everest_ds.data.clip_batches import Batch, PackedBatch
from everest_ds.data.reading import Failure
from everest_ds.parallel.batch_exchange import ReadBatch
from everest_ds.training.token_packing import unpack


class _Prepared(NamedTuple):
    """A prepared batch or the error that prevented it, and the samples that could not be read for it."""

    ready: ReadBatch | None
    error: Exception | None
    failures: list[Failure]


class Preparation:
    """The steps between loader and model: copy to the device, then unpacking or augmentation."""

    def __init__(self, config: Experiment, device: torch.device) -> None:
        self._device = device
        self._geometry = config.model.geometry
        self._augment = Augmentation(config)

    def __call__(self, batch: Batch) -> Batch:
        """Copy a batch to the device without waiting, and unpack or augment it there.

        Augmentation overwrites clips that are already on the device.
        """
        here = batch.to(self._device)
        if isinstance(here, PackedBatch):
            return unpack(here, self._geometry)
        return self._augment(here, batch.key.tolist())


class Prefetcher:
    """An ordered source of batches, each prepared by `fetch` during the previous step.

    On a GPU, a separate CUDA stream prepares the next batch in parallel with the step. An error during
    preparation is raised in the step that takes the batch.

    Args:
        batches: batches on the host, in pinned memory for a GPU.
        num_batches: at most this many batches are read from `batches`.
        failures: the list in which `batches` notes samples that could not be read.
        on_failure: called with each failure when its batch is taken.
        prepare: copies a batch to the device without waiting, and augments it.
        device: the device of the step.
        exchange: adds the batches that other ranks read for this rank.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        num_batches: int,
        failures: list[Failure],
        on_failure: Callable[[Failure], None],
        prepare: Callable[[Batch], Batch],
        device: torch.device,
        exchange: Callable[[Iterator[ReadBatch]], Iterator[ReadBatch]] = iter,
    ) -> None:
        self._ready = exchange(map(self._read, batches))
        self._num_left = num_batches
        self._failures = failures
        self._on_failure = on_failure
        self._prepare = prepare
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._prepared: _Prepared | None = None

    def fetch(self) -> None:
        """Prepare the next batch, if any; on a GPU, call this once most of a step has been launched."""
        if self._num_left:
            self._prepared = self._next()

    def take(self) -> ReadBatch:
        """Return the next batch, to be passed to `receive_batch` under tensor parallelism.

        Raises:
            DataError: if its clips could not be read. Any other error of its preparation is raised unchanged.
        """
        prepared, self._prepared = self._prepared or self._next(), None
        for failure in prepared.failures:
            self._on_failure(failure)
        if prepared.ready is None:
            assert prepared.error is not None
            raise prepared.error
        self._hand_over(prepared.ready.batch)
        return prepared.ready

    def _read(self, batch: Batch) -> ReadBatch:
        return ReadBatch(self._prepare(batch), batch.item)

    def _next(self) -> _Prepared:
        self._num_left -= 1
        ready, error = None, None
        try:
            with nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
                ready = next(self._ready)
        except Exception as failure:  # raised by `take`
            error = failure
        noted = self._failures.copy()
        self._failures.clear()
        return _Prepared(ready, error, noted)

    def _hand_over(self, batch: Batch) -> None:
        """Make the step's stream wait for the batch, and keep its memory until the step has used it."""
        if self._stream is None:
            return
        current = torch.cuda.current_stream(self._stream.device)
        current.wait_stream(self._stream)
        for tensor in batch:
            tensor.record_stream(current)
