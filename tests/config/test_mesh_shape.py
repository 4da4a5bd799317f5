"""Tests of the arrangement of ranks, against NumPy's index arithmetic and ranks placed one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.config import Experiment
from everest_ds.config.mesh_shape import (
    TENSOR_DEGREES,
    Axis,
    MeshShape,
    PerAxis,
    check_nodes_of_job,
    largest_shape,
    possible_shapes,
)
from everest_ds.errors import ConfigError, UsageError

degrees = st.sampled_from(TENSOR_DEGREES)
axes = st.sampled_from(PerAxis._fields)


def experiment(tensor: int = 1, backbone: str = "vit_huge") -> Experiment:
    tree: dict[str, Any] = {"task": "pretrain", "model": {"backbone": backbone}}
    return Experiment.model_validate(tree | {"parallelism": {"tensor": tensor}})


@given(data=st.integers(1, 9), tensor=degrees)
def test_coordinates_are_those_of_an_array_filled_row_by_row(data: int, tensor: int) -> None:
    shape = MeshShape.over(data * tensor, tensor)
    assert shape.degrees == (data, tensor) and shape.num_ranks == data * tensor
    found = [shape.coordinates(rank) for rank in range(data * tensor)]
    assert found == [np.unravel_index(rank, (data, tensor)) for rank in range(data * tensor)]


@given(data=st.integers(1, 9), tensor=degrees)
def test_groups_are_the_rows_and_columns_of_that_array(data: int, tensor: int) -> None:
    shape, ranks = MeshShape.over(data * tensor, tensor), np.arange(data * tensor).reshape(data, tensor)
    assert shape.groups("tensor") == ranks.tolist()
    assert shape.groups("data") == ranks.T.tolist()


@given(data=st.sampled_from([1, 2, 4, 8, 16]), tensor=degrees, a_node=degrees, axis=axes)
def test_a_group_lies_on_the_nodes_that_its_ranks_are_on(
    data: int, tensor: int, a_node: int, axis: Axis
) -> None:
    """Rank r is on node r // ranks per node. Groups share a node if they have a rank on it."""
    shape = MeshShape.over(data * tensor, tensor, a_node)
    nodes = [Counter(rank // a_node for rank in group) for group in shape.groups(axis)]
    found = shape.group(axis)
    assert {len(each) for each in nodes} == {found.nodes}
    assert {found.inside} == {count for each in nodes for count in each.values()}
    if found.nodes > 1:  # with one node, nothing is shared
        assert found.sharing == sum(0 in each for each in nodes)


def test_a_group_without_a_node_size_lies_on_one_node() -> None:
    assert MeshShape.over(64, 8).group("data").nodes == 1


@given(num_ranks=st.integers(1, 64), a_node=st.integers(1, 16), tensor=degrees)
def test_every_refusal_names_ranks_that_do_not_divide(num_ranks: int, a_node: int, tensor: int) -> None:
    config, refusals = experiment(tensor), list[str]()
    for check in (
        lambda: MeshShape.of(config, num_ranks),
        lambda: check_nodes_of_job(config, a_node),
    ):
        try:
            check()
        except ConfigError as error:
            refusals.append(str(error))
    expected = [f"{num_ranks} ranks; allowed: a multiple of {tensor} ranks"] if num_ranks % tensor else []
    expected += [f"{a_node} ranks per node; allowed: a multiple of {tensor}"] if a_node % tensor else []
    assert len(refusals) == len(expected)
    for refusal, part in zip(refusals, expected, strict=True):
        assert f"given: tensor={tensor}, {part}" in refusal


@given(tensor=degrees, local_size=st.integers(1, 16), nodes=st.integers(1, 3))
def test_a_placement_is_refused_on_the_ranks_whose_group_spans_nodes(
    tensor: int, local_size: int, nodes: int
) -> None:
    num_ranks = local_size * nodes * tensor
    shape = MeshShape.over(num_ranks, tensor)
    for group in shape.groups("tensor"):
        together = len({rank // local_size for rank in group}) == 1
        for rank in group:
            try:
                shape.check_placement(rank, rank % local_size, local_size)
                assert together
            except UsageError as error:
                assert not together and f"rank {rank} has ranks of its tensor group on another" in str(error)


@pytest.mark.parametrize(
    ("backbone", "num_ranks", "a_node", "tensors"),
    [("vit_huge", 64, 8, [1, 2, 4, 8]), ("vit_huge", 12, 4, [1, 2, 4]), ("vit_base", 64, 8, [1, 2])],
)
def test_possible_shapes_are_those_that_heads_and_nodes_allow(
    backbone: str, num_ranks: int, a_node: int, tensors: list[int]
) -> None:
    shapes = possible_shapes(experiment(backbone=backbone), num_ranks, a_node)
    assert [shape.degrees for shape in shapes] == [(num_ranks // tensor, tensor) for tensor in tensors]


def test_the_largest_shape_leaves_out_ranks_without_a_whole_group() -> None:
    assert largest_shape(experiment(4), 7).degrees == (1, 4)
    assert largest_shape(experiment(8), 4).degrees == (1, 8)


def test_a_shape_reads_as_a_sentence() -> None:
    assert str(MeshShape.over(8, 2)) == "8 = 4 data-parallel x 2 tensor-parallel (adjacent ranks of a node)"
    assert str(MeshShape.over(8)) == "8 = 8 data-parallel"
