"""Tests of the exchange of batches between the ranks of a tensor group, on real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from everest_ds.config.mesh_shape import MeshShape
from everest_ds.errors import DataError, EverestError
from everest_ds.parallel.batch_exchange import exchange_batches
from everest_ds.parallel.mesh import form_mesh
from everest_ds.parallel.world import World
from tests.ranks import run_ranks


class Pair(NamedTuple):
    pixels: Tensor
    number: Tensor


def pair(group: int, number: int) -> Pair:
    """Return a batch that only its group and number determine; the sizes differ from batch to batch."""
    generator = torch.Generator().manual_seed(100 * group + number)
    pixels = torch.randint(0, 256, (number % 5, 7, 3), dtype=torch.uint8, generator=generator)
    return Pair(pixels, torch.tensor(number))


def exchange_ten(world: World, tensor: int, failure: Exception | None) -> tuple[list[int], list[int], str]:
    """Exchange ten batches in each group; the reader of batch 7 of group 0 fails, if `failure` is given.

    Returns:
        The batches that this rank read and those that it got, and the error that ended the exchange.
    """
    mesh, read, got = form_mesh(world, MeshShape.over(world.size, tensor)), list[int](), list[int]()

    def batches() -> Iterator[Pair]:
        for number in mesh.turn.own(range(10)):
            if failure is not None and number == 7 and mesh.share == 0:
                raise failure
            read.append(number)
            yield pair(mesh.share, number)

    try:
        for number, batch in enumerate(exchange_batches(batches(), mesh)):
            expected = pair(mesh.share, number)
            assert type(batch) is Pair and torch.equal(batch.pixels, expected.pixels)
            batch.pixels.zero_()  # a batch is the rank's own: what it does with it is nobody else's business
            got.append(int(batch.number))
    except EverestError as error:
        return read, got, str(error)
    return read, got, ""


def test_each_batch_is_read_by_one_rank_of_its_group_and_reaches_all() -> None:
    for rank, (read, got, error) in enumerate(run_ranks(exchange_ten, 4, 4, None)):
        assert got == list(range(10)) and error == ""
        assert read == list(range(rank, 10, 4))


@pytest.mark.parametrize("failure", [DataError("no such disk"), ValueError("a bug")])
def test_an_error_of_one_reader_reaches_its_group_and_no_other(failure: Exception) -> None:
    results = run_ranks(exchange_ten, 4, 2, failure)
    for _, got, error in results[:2]:
        assert got == list(range(7)) and str(failure) in error
    assert [(got, error) for _, got, error in results[2:]] == [(list(range(10)), "")] * 2
