"""Tests of prefetching on a GPU: a separate stream copies and augments a batch during the previous step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from everest_ds.data.clip_batches import Batch, ClipBatch
from everest_ds.training.prefetch import Prefetcher
from tests.gpu import ON_CUDA

pytestmark = ON_CUDA
NUM_BATCHES, CLIP_BYTES = 24, 2**22
_LONG_CYCLES = 5_000_000  # some milliseconds, so that the host is far ahead of the device


def pinned_batches() -> Iterator[ClipBatch]:
    """Yield batches of noise in pinned memory; batch n has the key n."""
    for number in range(NUM_BATCHES):
        generator = torch.Generator().manual_seed(number)
        clip = torch.randint(0, 256, (1, CLIP_BYTES), dtype=torch.uint8, generator=generator)
        yield ClipBatch(clip.pin_memory(), *(torch.tensor([number]).pin_memory() for _ in range(3)))


def prepare(batch: Batch) -> Batch:
    """Copy a batch to the device, and change it in place after a delay on the stream."""
    here = batch.to(torch.device("cuda"))
    torch.cuda._sleep(_LONG_CYCLES)
    here.clip.bitwise_xor_(1)
    return here


def test_steps_see_their_own_batches_and_the_host_waits_for_none() -> None:
    """The memory of a batch is reused only after the step that reads it has finished."""
    expected = [int((batch.clip ^ 1).sum()) for batch in pinned_batches()]
    ahead = Prefetcher(pinned_batches(), NUM_BATCHES, [], print, prepare, torch.device("cuda"))
    sums = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(NUM_BATCHES):
            batch = ahead.take().batch
            torch.cuda._sleep(_LONG_CYCLES)
            sums.append(batch.clip.sum())
            del batch  # freed by the host before the device reads it
            ahead.fetch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [int(total) for total in sums] == expected


def test_a_gpu_prepares_a_batch_beside_the_step() -> None:
    device, main = torch.device("cuda"), torch.cuda.current_stream()
    streams, started = [], []

    def prepare(batch: Batch) -> Batch:
        streams.append(torch.cuda.current_stream())
        here = batch.to(device)
        started.append(torch.cuda.current_stream().record_event())
        return here._replace(clip=here.clip * 2 + 1)

    # Pinning takes longer than a step on some hosts; a run's loader pins in a thread of its own.
    batches = [
        ClipBatch(torch.full((2**20,), number).pin_memory(), *(torch.tensor([number]) for _ in range(3)))
        for number in range(20)
    ]
    ahead = Prefetcher(iter(batches), 20, [], lambda failure: None, prepare, device)
    sums = []
    for number in range(20):
        ready = ahead.take()
        torch.cuda._sleep(20_000_000)  # a step that computes for some 10 ms
        sums.append(ready.batch.clip.double().mean())
        busy = main.record_event()
        ahead.fetch()
        started[-1].synchronize()
        if 2 < number < 19:  # the device finishes its work before it loads kernels that are new to it
            assert not busy.query()  # the next batch arrived while the step was running
        del ready  # the next batch may reuse this memory, but only after the sum is done
    assert torch.stack(sums).tolist() == [2 * number + 1 for number in range(20)]
    assert main not in streams and len(set(streams)) == 1
