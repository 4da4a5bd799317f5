"""The block plan of MViT (mvit.py): widths, token grids and strides of all blocks, as integers only.

Sources: Fan et al., ICCV 2021, tables 3 and 4; SlowFast's configs/Kinetics/MVIT_B_16x4_CONV.yaml. MViT-S was
never released: `MVIT_S` is the interpretation of the paper that gives the published 26.1 M parameters; its
compute is 3.6 % below the published figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

TokenGrid = tuple[int, int, int]  # tokens along time, height and width


@dataclass(frozen=True)
class MViTShape:
    """The hyperparameters that distinguish the sizes of MViT.

    Attributes:
        width: width of the first stage; each further stage doubles the width and the number of heads.
        depths: number of blocks per stage.
        stem_kernel: kernel size of the first convolution in space; in time it is 3.
        stem_stride: stride of the first convolution in space; in time it is 2.
        stem_padding: padding of the first convolution in space; in time it is 1.
        kv_stride: spatial stride of keys and values in the first stage; each further stage halves it.
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
    """The plan of one block: input and output width, heads, input grid, and spatial strides."""

    width: int
    out_width: int
    heads: int
    grid: TokenGrid
    q_stride: int
    kv_stride: int

    @property
    def out_grid(self) -> TokenGrid:
        """The token grid of the block's output."""
        return pooled(self.grid, self.q_stride)


def pooled(grid: TokenGrid, stride: int) -> TokenGrid:
    """Return `grid` after pooling: time stays, height and width are divided by `stride`, rounded up."""
    return grid[0], -(-grid[1] // stride), -(-grid[2] // stride)


def plan_blocks(shape: MViTShape, grid: TokenGrid) -> Iterator[BlockPlan]:
    """Yield the plans of all blocks, given the stem's output grid.

    The last block of every stage but the last doubles the width.
    """
    last_stage = len(shape.depths) - 1
    for stage, depth in enumerate(shape.depths):
        width, kv_stride = shape.width << stage, max(shape.kv_stride >> stage, 1)
        for i in range(depth):
            grows = i == depth - 1 and stage < last_stage
            q_stride = 2 if i == 0 and stage > 0 else 1
            plan = BlockPlan(width, width << grows, 1 << stage, grid, q_stride, kv_stride)
            yield plan
            grid = plan.out_grid
