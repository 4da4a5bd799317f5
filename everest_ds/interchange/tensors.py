"""Conversion of parameter shapes between EVEREST-DS and other systems.

Other systems store the patch embedding as a Conv3d, with inputs in (colour, frame, row, column) order;
EVEREST-DS stores a linear map with inputs in (frame, row, column, colour) order. The mask token of other
systems has two additional axes of size 1. The projections of q, k and v are a single matrix in EVEREST-DS and
may be three elsewhere.

Shape legend: D width, C = 3 colours, t frames and p x p pixels of one tubelet.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from everest_ds.config.tokens import ClipGeometry
from everest_ds.interchange.layouts import EMBEDDING

TensorShape = tuple[int, ...]


def our_shape(theirs: Sequence[TensorShape]) -> TensorShape:
    """Return the EVEREST-DS shape of a parameter that has the given shapes in another system."""
    first = theirs[0]
    if len(theirs) > 1:
        return (sum(shape[0] for shape in theirs), *first[1:])
    if len(first) == 5:
        width, colours, *tubelet = first
        return width, tubelet[0] * tubelet[1] * tubelet[2] * colours
    return first[2:] if len(first) == 3 and first[:2] == (1, 1) else first


def to_ours(theirs: Sequence[Tensor]) -> Tensor:
    """Convert the tensors of a parameter in another system to the EVEREST-DS parameter."""
    shape = our_shape([tuple(tensor.shape) for tensor in theirs])
    if theirs[0].ndim == 5:
        return theirs[0].permute(0, 2, 3, 4, 1).reshape(shape)
    return torch.cat(list(theirs)).reshape(shape)


def to_theirs(name: str, ours: Tensor, parts: int, geometry: ClipGeometry) -> list[Tensor]:
    """Convert an EVEREST-DS parameter to the shape of the original code and of transformers.

    Args:
        name: EVEREST-DS name of the parameter.
        ours: the EVEREST-DS parameter.
        parts: number of tensors to split the parameter into.
        geometry: tubelet grid, which defines the axes of the patch embedding.
    """
    if name == EMBEDDING:
        t, p = geometry.tubelet_size, geometry.patch_size
        return [ours.view(-1, t, p, p, 3).permute(0, 4, 1, 2, 3).contiguous()]
    if name == "mask_token":
        return [ours.view(1, 1, -1)]
    return [part.contiguous() for part in ours.chunk(parts)]
