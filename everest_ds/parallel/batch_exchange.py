"""The exchange of batches in a tensor group, whose ranks compute on the same clips: each batch is read once.

The ranks read the batches of their group in turn. The reader of a batch prepares it on its device. It then
announces it to the others over gloo, or the error that prevented it, and the batch itself follows over the
links of the devices, like the all-reduces of the layers: through the same group and in the same stream, so
that every rank launches all of them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import cycle
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.initialize import get_model_parallel_group
from torch import Tensor

from everest_ds.errors import DataError, EverestError
from everest_ds.log import logger
from everest_ds.parallel.mesh import Mesh

# A named tuple of tensors.
B = TypeVar("B", bound=tuple[Tensor, ...])
_UNREAD = "a batch cannot be read for its tensor group"


class ReadBatch(NamedTuple):
    """A batch on the device; on ranks that have not read it, memory for it until `receive_batch`.

    Attributes:
        batch: named tuple of tensors on the device.
        items: int64 (B,) on the host, the sample index of each clip; (0,) in evaluation.
        reader: the rank that has read the batch.
    """

    batch: Any
    items: Tensor
    reader: int = 0


class _Announcement(NamedTuple):
    """The description of a batch, or the end of the batches, or the error of their reader.

    Attributes:
        kind: type of the batch; None at the end.
        tensors: shape and type of each of its tensors.
        items: as in `ReadBatch`.
        error: the reason why the batch cannot be read.
    """

    kind: Callable[..., Any] | None = None
    tensors: tuple[tuple[torch.Size, torch.dtype], ...] = ()
    items: Tensor = torch.empty(0, dtype=torch.int64)
    error: Exception | None = None


def announce_batches(
    batches: Iterator[ReadBatch],
    mesh: Mesh,
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[ReadBatch]:
    """Yield every batch of a tensor group on each of its ranks, in order, to be passed to `receive_batch`.

    Args:
        batches: the batches that this rank reads: those of its group at `mesh.turn`.
        mesh: the ranks of the run.
        waiting: entered while this rank waits for another rank of its group to read a batch.

    Raises:
        Exception: on every rank of the group, the error that the reader of a batch raised.
    """
    return batches if mesh.degrees.tensor == 1 else _announce(batches, mesh, waiting)


def receive_batch(read: ReadBatch, mesh: Mesh) -> Any:
    """Return an announced batch, once its reader has sent it. Call on every rank of the tensor group."""
    if mesh.degrees.tensor > 1:
        for tensor in read.batch:
            dist.broadcast(tensor, read.reader, get_model_parallel_group())
    return read.batch


def exchange_batches(batches: Iterator[B], mesh: Mesh) -> Iterator[B]:
    """Yield every batch of a tensor group on each of its ranks, on the device; errors as `announce_batches`.

    Without tensor parallelism, the batches stay where they are.
    """
    if mesh.degrees.tensor == 1:
        return batches

    def copy(batch: B) -> ReadBatch:
        here = type(batch)(*(tensor.to(mesh.world.device) for tensor in batch))
        return ReadBatch(here, torch.empty(0, dtype=torch.int64))

    return (receive_batch(read, mesh) for read in announce_batches(map(copy, batches), mesh))


def _announce(
    batches: Iterator[ReadBatch], mesh: Mesh, waiting: Callable[[], AbstractContextManager[None]]
) -> Iterator[ReadBatch]:
    group, rank, device = get_model_parallel_group(), mesh.world.rank, mesh.world.device
    for reader in cycle(dist.get_process_group_ranks(group)):
        own, message = _read(batches, rank) if reader == rank else (None, None)
        box = [message]
        with waiting() if reader != rank else nullcontext():
            dist.broadcast_object_list(box, reader, group, torch.device("cpu"))
        kind, tensors, items, error = box[0] or _Announcement()
        if error is not None:
            raise error
        if kind is None:
            return
        if own is None:
            memory = (torch.empty(shape, dtype=dtype, device=device) for shape, dtype in tensors)
            own = ReadBatch(kind(*memory), items, reader)
        yield own


def _read(batches: Iterator[ReadBatch], rank: int) -> tuple[ReadBatch | None, _Announcement]:
    """Return this rank's next batch and its announcement.

    Every error becomes an announcement, because the other ranks of the group are waiting for one.
    """
    try:
        read = next(batches, None)
        if read is None:
            return None, _Announcement()
        kind = type(read.batch)
        batch = kind(*(tensor.contiguous() for tensor in read.batch))
        tensors = tuple((tensor.shape, tensor.dtype) for tensor in batch)
        return ReadBatch(batch, read.items, rank), _Announcement(kind, tensors, read.items)
    except (EverestError, OSError, RuntimeError) as error:
        return None, _Announcement(error=error)
    except Exception as error:  # a fault of this code, whose traceback would be lost on the way
        logger.exception(_UNREAD)
        given = f"{type(error).__name__}: {error}"
        found = DataError(_UNREAD, given=given, fix="see the traceback in the rank's log")
        return None, _Announcement(error=found)
