"""How one of our parameters is shaped elsewhere.

The patch embedding is a Conv3d there, a linear map here: its inputs are (colour, frame, row, column) there,
(frame, row, column, colour) here. The mask token has two axes of 1 more there. What q, k and v are projected
with is one matrix here and may be three there.

Shape legend: D width, C = 3 colours, t frames and p x p pixels of a tubelet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.interchange.layouts import EMBEDDING

Shape = tuple[int, ...]


def our_shape(theirs: Sequence[Shape]) -> Shape:
    """The shape here of a parameter that has these shapes elsewhere."""
    first = theirs[0]
    if len(theirs) > 1:
        return (sum(shape[0] for shape in theirs), *first[1:])
    if len(first) == 5:
        width, colours, *tubelet = first
        return width, tubelet[0] * tubelet[1] * tubelet[2] * colours
    return first[2:] if len(first) == 3 and first[:2] == (1, 1) else first


def to_ours(theirs: Sequence[Tensor]) -> Tensor:
    """A parameter in the shape that it has here."""
    shape = our_shape([tuple(tensor.shape) for tensor in theirs])
    if theirs[0].ndim == 5:
        return theirs[0].permute(0, 2, 3, 4, 1).reshape(shape)
    return torch.cat(list(theirs)).reshape(shape)


def to_theirs(name: str, ours: Tensor, parts: int, geometry: ClipGeometry) -> list[Tensor]:
    """One of our parameters as the originals and transformers shape it.

    Args:
        name: ours.
        parts: in how many tensors.
    """
    if name == EMBEDDING:
        t, p = geometry.tubelet_size, geometry.patch_size
        return [ours.view(-1, t, p, p, 3).permute(0, 4, 1, 2, 3).contiguous()]
    if name == "mask_token":
        return [ours.view(1, 1, -1)]
    return [part.contiguous() for part in ours.chunk(parts)]
