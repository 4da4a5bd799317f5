"""Tests of MViT: the published block plan, pooling against a loop, and the skip paths of a block."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from everest_ds.config.backbones import TransformerShape
from everest_ds.efficiency.peers.layers import SelfAttention, blocks_with
from everest_ds.efficiency.peers.mvit import PoolingBlock, conv_pool, max_pool
from everest_ds.efficiency.peers.mvit_plan import MVIT_B, MVIT_S, BlockPlan, MViTShape, plan_blocks

GRID = (2, 5, 6)
KEYS = torch.tensor([5, 6])


def test_plan_of_mvit_b_is_the_published_one() -> None:
    """Each block has the published width, sides of input, queries, and keys and values, and output width."""
    plans = plan_blocks(MVIT_B, (8, 56, 56))
    rows = [(p.width, p.grid[1], p.out_grid[1], -(-p.grid[1] // p.kv_stride), p.out_width) for p in plans]
    assert rows == [
        (96, 56, 56, 7, 192),
        (192, 56, 28, 14, 192),
        (192, 28, 28, 7, 384),
        (384, 28, 14, 14, 384),
        *[(384, 14, 14, 7, 384)] * 9,
        (384, 14, 14, 7, 768),
        (768, 14, 7, 14, 768),
        (768, 7, 7, 7, 768),
    ]


@pytest.mark.parametrize(("shape", "side"), [(MVIT_B, 56), (MVIT_S, 28)])
def test_heads_keep_their_width_and_time_its_length(shape: MViTShape, side: int) -> None:
    plans = list(plan_blocks(shape, (8, side, side)))
    assert {p.width // p.heads for p in plans} == {shape.width}
    assert {p.out_grid[0] for p in plans} == {8}
    assert plans[-1].out_grid == (8, 7, 7)
    for before, after in itertools.pairwise(plans):
        assert (before.out_width, before.out_grid) == (after.width, after.grid)


def tokens() -> Tensor:
    """Draw random tokens (B, h, n, d), the class token first."""
    return torch.randn(2, 3, 1 + 2 * 5 * 6, 4, generator=torch.Generator().manual_seed(0))


def neighbourhood(
    x_Bhnd: Tensor, t: int, row: int, column: int, reach: tuple[int, int, int]
) -> list[tuple[tuple[int, ...], Tensor]]:
    """Return (offset, patch) for all places around a place that lie within the grid."""
    maps = x_Bhnd[:, :, 1:].unflatten(2, GRID)
    around = itertools.product(*(range(-r, r + 1) for r in reach))
    found = []
    for offset in around:
        place = tuple(a + b for a, b in zip((t, row, column), offset, strict=True))
        if all(0 <= p < size for p, size in zip(place, GRID, strict=True)):
            found.append((offset, maps[:, :, place[0], place[1], place[2]]))
    return found


@pytest.mark.parametrize("stride", [2, 4])
def test_max_pooling_is_over_windows_one_wider_than_the_stride(stride: int) -> None:
    x, pool = tokens(), max_pool(GRID, stride)
    out = pool(x)
    assert torch.equal(out[:, :, 0], x[:, :, 0])
    reach = (0, (stride + 1) // 2, (stride + 1) // 2)
    places = itertools.product(range(2), range(0, 5, stride), range(0, 6, stride))
    for i, (t, row, column) in enumerate(places):
        window = [patch for _, patch in neighbourhood(x, t, row, column, reach)]
        assert torch.equal(out[:, :, 1 + i], torch.stack(window).amax(dim=0))
    assert out.shape[2] == 2 + i


@pytest.mark.parametrize("stride", [1, 2])
def test_conv_pooling_weighs_3_places_each_way_in_each_channel(stride: int) -> None:
    torch.manual_seed(0)
    x, pool = tokens(), conv_pool(GRID, stride, width=4)
    out, weight = pool(x), pool.get_parameter("pool.weight")[:, 0]
    expected = [x[:, :, 0]]
    for t, row, column in itertools.product(range(2), range(0, 5, stride), range(0, 6, stride)):
        around = neighbourhood(x, t, row, column, (1, 1, 1))
        terms = [weight[:, 1 + o[0], 1 + o[1], 1 + o[2]] * patch for o, patch in around]
        expected.append(torch.stack(terms).sum(dim=0))
    torch.testing.assert_close(out, pool.norm(torch.stack(expected, dim=2)))


def block(out_width: int, q_stride: int) -> PoolingBlock:
    torch.manual_seed(0)
    plan = BlockPlan(8, out_width, heads=2, grid=GRID, q_stride=q_stride, kv_stride=1)
    module = PoolingBlock(plan, "max", drop_path=0.0, index=0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def sequence() -> Tensor:
    return torch.randn(2, 61, 8, generator=torch.Generator().manual_seed(1))


def silence(*linears: torch.nn.Module) -> None:
    for linear in linears:
        for parameter in linear.parameters():
            torch.nn.init.zeros_(parameter)


def test_a_block_that_neither_pools_nor_widens_is_a_plain_one() -> None:
    ours, x = block(8, 1), sequence()
    plain = blocks_with(lambda: SelfAttention(8, 2), TransformerShape(8, 1, 2))[0]
    for theirs, mine in zip(plain.parameters(), ours.parameters(), strict=True):
        theirs.data.copy_(mine)  # both list parameters in the order of computation
    torch.testing.assert_close(ours(x, KEYS), plain(x))


def test_where_queries_are_pooled_so_is_what_they_are_added_to() -> None:
    module, x = block(8, 2), sequence()
    silence(module.attention.proj, module.mlp[1])
    torch.testing.assert_close(module(x, KEYS), max_pool(GRID, 2)(x[:, None])[:, 0])


def test_where_the_width_grows_the_normalised_input_is_mapped_to_it() -> None:
    module, x = block(16, 1), sequence()
    silence(module.mlp[1])
    assert module.widen_skip is not None
    attended = x + module.attention(module.attention_norm(x))
    torch.testing.assert_close(module(x, KEYS), module.widen_skip(module.mlp_norm(attended)))
