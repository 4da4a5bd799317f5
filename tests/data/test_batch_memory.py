"""Tests of the memory of batches: values last as long as a tensor on them, then the memory is used again."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everest_ds.config import DataConfig, shared_batches
from everest_ds.data import batch_memory
from everest_ds.data.batch_memory import BatchMemory
from everest_ds.data.clip_source import LoadedItem, NewClip, new_clip
from everest_ds.data.loader import load
from everest_ds.data.reading import SampleReader
from everest_ds.data.video_list import Sample

LARGE = 2**15  # bytes of a clip: two clips make a batch that travels through shared memory


class Clip(NamedTuple):
    pixels: Tensor
    number: Tensor
    weights: Tensor


class Source:
    """A source of clips filled with their number; `place` says whether an item is put where it is wanted."""

    def __init__(self, sizes: list[int], placed: list[bool], weights: int = LARGE // 8) -> None:
        self.reader = SampleReader([Sample(Path(f"{i}.mp4"), None) for i in range(len(sizes))], DataConfig())
        self.new_clip: NewClip = new_clip
        self.sizes, self.placed, self.weights = sizes, placed, weights

    def __getitem__(self, item: int) -> LoadedItem:
        shape = (self.sizes[item], LARGE)
        wanted = self.new_clip(shape)
        pixels = (wanted if self.placed[item] else torch.empty(shape, dtype=torch.uint8)).fill_(item)
        weights = torch.full((self.weights,), item, dtype=torch.float64)
        return LoadedItem([Clip(pixels, torch.tensor(item), weights)], [])

    def name_of(self, item: int) -> str:
        return f"{item}.mp4"


def loaded(source: Source, batches: list[list[int]], workers: int) -> Iterator[Any]:
    config = DataConfig(num_workers=workers)
    return load(source, iter(batches), config, False, lambda failure: None)


def check(batch: Clip, items: list[int], source: Source) -> None:
    assert batch.number.tolist() == items
    shape = (len(items), source.sizes[items[0]], LARGE)
    assert torch.equal(batch.pixels, torch.tensor(items, dtype=torch.uint8).view(-1, 1, 1).expand(shape))
    assert torch.equal(batch.weights, torch.tensor(items).double().view(-1, 1).expand(-1, source.weights))


@settings(max_examples=12)
@given(data=st.data(), workers=st.integers(1, 2))
def test_a_batch_keeps_its_values_while_a_tensor_on_it_lives(data: st.DataObject, workers: int) -> None:
    """Batches of changing sizes are held for random times, some by a view only or as an array."""
    counts = data.draw(st.lists(st.integers(1, 3), min_size=4, max_size=14))
    ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
    batches = [list(range(first, stop)) for first, stop in zip(ends, ends[1:], strict=False)]
    sizes = [data.draw(st.sampled_from([1, 2, 4])) for _ in batches]
    source = Source(
        [size for size, batch in zip(sizes, batches, strict=True) for _ in batch],
        data.draw(st.lists(st.booleans(), min_size=ends[-1], max_size=ends[-1])),
    )
    held: dict[int, Any] = {}
    for number, batch in enumerate(loaded(source, batches, workers)):
        check(batch, batches[number], source)
        how = data.draw(st.sampled_from(["drop", "hold", "view", "array"]))
        held |= {"drop": {}, "hold": {number: batch}}.get(how, {number: batch.pixels[-1:, 0]})
        if how == "array":
            held[number] = held[number].numpy()
        del batch
        for other in data.draw(st.lists(st.sampled_from(sorted(held)), unique=True)) if held else []:
            value = held.pop(other)
            last = batches[other][-1]
            check(value, batches[other], source) if isinstance(value, Clip) else None
            assert isinstance(value, Clip) or (value == last).all()


def test_memory_is_used_again_and_as_much_of_it_as_is_predicted() -> None:
    """A rank holds two batches; all batches share few places, and no value is that of another batch."""
    for workers in (1, 2):
        batches = [[i, i + 1] for i in range(0, 60, 2)]
        source = Source(60 * [1], 60 * [True], weights=1)
        places: set[int] = set()
        before: Any = None
        for number, batch in enumerate(loaded(source, batches, workers)):
            check(batch, batches[number], source)
            if before is not None:
                check(before, batches[number - 1], source)
            before = batch
            places.add(batch.pixels.data_ptr())
            del batch
        assert len(places) <= shared_batches(workers) < len(batches)
        assert len(places) > workers  # a worker never waits for the rank to drop a batch


def test_a_clip_that_is_put_where_it_is_wanted_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, source = BatchMemory(), Source([2, 2, 2], 3 * [True])
    source.new_clip = memory.new_clip

    def join() -> Any:
        joined = memory.joined([clip for item in range(3) for clip in source[item].clips])
        memory.end_batch()
        return joined

    join()  # the first batch shows how much memory a batch takes
    monkeypatch.setattr(torch, "stack", _only_weights(torch.stack))
    pixels = join().pixels
    received, arguments = pixels.__reduce__()
    assert received(*arguments)[:, 0, 0].tolist() == [0, 1, 2]


def _only_weights(stack: Any) -> Any:
    def checked(tensors: list[Tensor], **options: Any) -> Tensor:
        assert tensors[0].dtype != torch.uint8
        joined: Tensor = stack(tensors, **options)
        return joined

    return checked


def test_a_process_that_the_rank_forks_does_not_free_its_batches() -> None:
    """Its copy of a batch ends with it, while the rank still uses the batch."""
    memory = BatchMemory()
    handed = memory.joined([torch.full((LARGE * 2,), 5, dtype=torch.uint8)])
    received, arguments = handed.__reduce__()
    batch = received(*arguments)

    def drop(end: Connection) -> None:
        nonlocal batch
        del batch
        gc.collect()
        end.send("dropped")

    ours, theirs = get_context("fork").Pipe()
    child = get_context("fork").Process(target=drop, args=(theirs,))
    child.start()
    assert ours.recv() == "dropped"
    child.join()
    assert memory._taken[handed.place.number] == 1
    del batch
    assert memory._taken[handed.place.number] == 0


def test_memory_ends_with_its_pass() -> None:
    def mapped() -> int:
        gc.collect()
        return sum(batch_memory.SHARED_MEMORY in line for line in open("/proc/self/maps"))

    before, files = mapped(), len(os.listdir("/proc/self/fd"))
    source = Source(20 * [2], 20 * [True])
    kept = [batch.pixels for batch in loaded(source, [[i] for i in range(20)], 2)][3]
    assert mapped() > before
    assert kept.unique().tolist() == [3]
    del kept
    assert mapped() == before and len(os.listdir("/proc/self/fd")) == files
