"""Fixed sine-cosine position tables.

`flat` encodes the token index, as VideoMAE does; `grid` encodes slot, row and column, as MVD does (and MAE
for images). Sources of the grids: github.com/facebookresearch/mae and github.com/ruiwang2021/mvd
(modeling_teacher.py, modeling_finetune.py).

Shape legend: L = G·G places of one grid, T slots, N = T·L tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from everest_ds.config.schema import ModelConfig
from everest_ds.config.tokens import ClipGeometry
from everest_ds.models.tubelets import sincos_positions


def encoder_positions(model: ModelConfig, width: int) -> Tensor:
    """Compute the encoder's position table: float32 (N, D).

    With `positions_from`, this is the table of that clip shape, interpolated linearly over slots, rows and
    columns: an encoder then finds a place of the clip under about the position that it learned for the place.
    """
    learned, own = model.position_geometry, model.geometry
    table_ND = fixed_positions(model.positions, learned, width)
    if learned == own:
        return table_ND
    grid = (learned.num_slots, learned.grid_size, learned.grid_size)
    table_1DTGG = table_ND.T.reshape(1, width, *grid)
    return (
        interpolate(table_1DTGG, (own.num_slots, own.grid_size, own.grid_size), mode="trilinear")
        .flatten(2)[0]
        .T.contiguous()
    )


def fixed_positions(kind: str, geometry: ClipGeometry, width: int) -> Tensor:
    """Compute the position table of the given kind (`flat` or `grid`): float32 (N, D)."""
    if kind == "grid":
        return video_positions(geometry, width)
    return sincos_positions(geometry.num_tokens, width)


def image_positions(grid_size: int, width: int) -> Tensor:
    """Encode the column in one half of the channels and the row in the other: float32 (L, D)."""
    place = torch.arange(grid_size**2)
    return torch.cat(
        [_sincos(place % grid_size, width // 2), _sincos(place // grid_size, width // 2)], dim=1
    ).float()


def video_positions(geometry: ClipGeometry, width: int) -> Tensor:
    """Encode the slot in a quarter of the channels, column and row in the others: float32 (N, D)."""
    of_slot_TD = _sincos(torch.arange(geometry.num_slots), width // 4).float()
    of_place_LD = image_positions(geometry.grid_size, width - width // 4)
    slot = torch.arange(geometry.num_slots).repeat_interleave(geometry.tokens_per_slot)
    return torch.cat([of_slot_TD[slot], of_place_LD.repeat(geometry.num_slots, 1)], dim=1)


def _sincos(position: Tensor, width: int) -> Tensor:
    """Encode positions as sines, then cosines, of all frequencies: float64 (len(position), width)."""
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) / (width // 2))
    angle = position[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1)
