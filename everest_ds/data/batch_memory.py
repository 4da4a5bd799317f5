"""Memory through which a loader worker hands its batches to its rank, used again and again.

Torch's loader makes new shared memory for each tensor of each batch. The kernel has to clear and map its
pages, which can take longer than to decode a clip from a frame store. Here a worker keeps the memory of its
batches, and fills it again after the rank has dropped the last tensor that lies in it, however long that
takes. Small tensors travel through the queue itself.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHARED_MEMORY = "/dev/shm"
# Larger tensors travel through shared memory. A message below 4096 bytes enters the queue whole or not at
# all, even if its worker is killed meanwhile.
_LARGE_BYTES = 512
_MOST_PLACES = 2**16  # one byte each, at the beginning of the file; many times as many as are ever in use
_numbers = count()


class _Place(NamedTuple):
    """A part of the memory that holds one tensor at a time.

    Attributes:
        number: its number in the order of allocation.
        start: offset in the file, in bytes.
        size: length in bytes.
    """

    number: int
    start: int
    size: int


class BatchMemory:
    """The memory of one worker; its rank creates it before it forks the worker.

    Attributes:
        number: identifies the memory in the rank and in the worker.

    Raises:
        OSError: if shared memory is full.
    """

    def __init__(self) -> None:
        self.number = next(_numbers)
        self._rank = os.getpid()
        self._file, path = tempfile.mkstemp(dir=SHARED_MEMORY)
        os.unlink(path)  # so that the memory ends with the last process that uses it
        weakref.finalize(self, os.close, self._file).atexit = False
        self._views: dict[int, NDArray[np.uint8]] = {}
        # Number by number: 1 from when the worker takes a place until the rank has dropped its tensors.
        self._taken = self._view(self._allocated(_Place(-1, 0, _MOST_PLACES)))
        _memories[self.number] = self
        # The following attributes serve the worker.
        self._places: list[_Place] = []
        self._open: _Place | None = None  # takes the clips of the batch in progress
        self._requested = 0  # bytes of the clips requested for this batch
        self._expected = 0  # bytes that the batch is expected to need: those of the one before

    def new_clip(self, shape: tuple[int, ...]) -> Tensor:
        """Return a uint8 tensor for a clip of the batch in progress, in its memory if it fits in."""
        size = math.prod(shape)
        first = self._requested
        self._requested += size
        if self._open is None and self._expected:
            self._open = self._take(self._expected)
        if self._open is None or self._requested > self._open.size:
            return torch.empty(shape, dtype=torch.uint8)
        return torch.from_numpy(self._view(self._open)[first : first + size]).view(shape)

    def joined(self, clips: Sequence[Any]) -> Any:
        """Join clips, tensors or named tuples of tensors, into a batch that can be sent to the rank.

        Raises:
            OSError: if shared memory is full.
            RuntimeError: if the shapes or types of the clips differ.
        """
        first = clips[0]
        if isinstance(first, Tensor):
            return self._stacked(clips)
        return type(first)(*(self._stacked(tensors) for tensors in zip(*clips, strict=True)))

    def end_batch(self) -> None:
        """Free what was requested for a batch but did not become part of it."""
        if self._open is not None:
            self._taken[self._open.number] = 0
        self._open, self._expected, self._requested = None, self._requested, 0

    def received(self, place: _Place) -> Tensor:
        """Return what the worker put in a place, as bytes; the place is free again once these are dropped."""
        lease = self._view(place)[:]
        weakref.finalize(lease, _free, self._rank, self._taken, place.number).atexit = False
        return torch.from_numpy(lease)

    def _stacked(self, tensors: Sequence[Tensor]) -> _Handed | _Sent:
        size = len(tensors) * tensors[0].nbytes
        if size < _LARGE_BYTES:
            return _Sent(torch.stack(list(tensors)).numpy())
        shape, dtype = (len(tensors), *tensors[0].shape), tensors[0].dtype
        place, self._open = self._open, None
        if place is None or not self._holds(place, tensors):
            self._open = place
            place = self._take(size)
            out = torch.from_numpy(self._view(place)[:size]).view(dtype).view(shape)
            torch.stack(list(tensors), out=out)
        return _Handed(self.number, place, shape, dtype)

    def _holds(self, place: _Place, tensors: Sequence[Tensor]) -> bool:
        """Return whether the tensors lie in the place one after the other, from its beginning."""
        begin, size = self._view(place).ctypes.data, tensors[0].nbytes
        return all(
            tensor.data_ptr() == begin + row * size and tensor.nbytes == size and tensor.is_contiguous()
            for row, tensor in enumerate(tensors)
        )

    def _take(self, size: int) -> _Place:
        """Return a free place of at least this size, the smallest one, or else a new one."""
        free = [place for place in self._places if place.size >= size and not self._taken[place.number]]
        place = min(free, key=lambda place: place.size) if free else self._added(size)
        self._taken[place.number] = 1
        return place

    def _added(self, size: int) -> _Place:
        last = self._places[-1] if self._places else _Place(-1, 0, _MOST_PLACES)
        whole_pages = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        place = self._allocated(_Place(last.number + 1, last.start + last.size, whole_pages))
        self._places.append(place)
        return place

    def _allocated(self, place: _Place) -> _Place:
        # Without this call, a write to memory that is full would end the process.
        os.posix_fallocate(self._file, place.start, place.size)
        return place

    def _view(self, place: _Place) -> NDArray[np.uint8]:
        if place.number not in self._views:
            mapping = mmap.mmap(self._file, place.size, offset=place.start)
            self._views[place.number] = np.frombuffer(mapping, np.uint8)
        return self._views[place.number]


# The memories of this process, by which a tensor is found that arrives through the queue.
_memories: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()


class _Handed(NamedTuple):
    """A tensor in a worker's memory, which the rank unpickles as that tensor."""

    memory: int
    place: _Place
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        return _received, tuple(self)


class _Sent(NamedTuple):
    """A small tensor, which the rank unpickles from the queue."""

    values: NDArray[Any]

    def __reduce__(self) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
        return torch.from_numpy, (self.values,)


def _received(memory: int, place: _Place, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    return _memories[memory].received(place)[:size].view(dtype).view(shape)


def _free(rank: int, taken: NDArray[np.uint8], number: int) -> None:
    if os.getpid() == rank:  # A process that the rank has forked drops copies of the rank's tensors.
        taken[number] = 0
