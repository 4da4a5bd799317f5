"""The sizes of MViT (mvit.py): which block has what width, grid and strides. Integers only.

Sources: Fan et al., ICCV 2021, tables 3 and 4; SlowFast's configs/Kinetics/MVIT_B_16x4_CONV.yaml. MViT-S was
never released: `MVIT_S` is the reading whose parameters come out at the published 26.1 M; its compute stays
3.6 % below the published figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Grid = tuple[int, int, int]  # tokens along time, height and width


@dataclass(frozen=True)
class MViTShape:
    """What sets the sizes of MViT apart.

    Attributes:
        width: of the first stage; each further stage has twice the width and heads of the one before.
        depths: blocks of each stage.
        stem_kernel: of the first convolution, in space; 3 in time.
        stem_stride: the same; 2 in time.
        stem_padding: the same; 1 in time.
        kv_stride: of keys and values, in space, in the first stage; half as much in each further one.
    """

    width: int
    depths: tuple[int, ...]
    stem_kernel: int
    stem_stride: int
    stem_padding: int
    kv_stride: int


MVIT_B = MViTShape(96, (1, 2, 11, 2), stem_kernel=7, stem_stride=4, stem_padding=3, kv_stride=8)
MVIT_S = MViTShape(128, (4, 7, 6), stem_kernel=8, stem_stride=8, stem_padding=0, kv_stride=4)


@dataclass(frozen=True)
class BlockPlan:
    """One block: widths in and out, heads, the grid of its input, strides in space."""

    width: int
    out_width: int
    heads: int
    grid: Grid
    q_stride: int
    kv_stride: int

    @property
    def out_grid(self) -> Grid:
        """The grid of its output."""
        return pooled(self.grid, self.q_stride)


def pooled(grid: Grid, stride: int) -> Grid:
    """The grid that is left of `grid`: time stays, space shrinks by `stride`, rounded up."""
    return grid[0], -(-grid[1] // stride), -(-grid[2] // stride)


def plan_blocks(shape: MViTShape, grid: Grid) -> Iterator[BlockPlan]:
    """All blocks, from the grid that the stem leaves on: the width grows in the last block of a stage."""
    last_stage = len(shape.depths) - 1
    for stage, depth in enumerate(shape.depths):
        width, kv_stride = shape.width << stage, max(shape.kv_stride >> stage, 1)
        for i in range(depth):
            grows = i == depth - 1 and stage < last_stage
            q_stride = 2 if i == 0 and stage > 0 else 1
            plan = BlockPlan(width, width << grows, 1 << stage, grid, q_stride, kv_stride)
            yield plan
            grid = plan.out_grid
