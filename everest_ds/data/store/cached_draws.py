"""Writing and reading of the draws of a token cache, each with one read and compared with its checksum.

Shape legend: R repeats, K kept tokens, P values of a tubelet.
"""

from __future__ import annotations

import io
import zlib

import numpy as np
import torch
from torch import Tensor

from everest_ds.data.order import Visit
from everest_ds.data.store.layout import BLOCK_BYTES, NPY_HEADER_BYTES, folder_of, padded, tar_member
from everest_ds.data.store.stored_video import read_into
from everest_ds.data.store.token_cache import CACHE, TokenCache
from everest_ds.errors import DataError

_CONTENT_AT = BLOCK_BYTES + NPY_HEADER_BYTES  # offset of an array in its tar member


def draw_members(draw: Visit, tubelets_RKP: Tensor, kept_RK: Tensor) -> bytes:
    """Return the tar members of a draw: uint8 tubelets (R, K, P) and int32 indices (R, K) of their tokens."""
    name = f"{folder_of(draw.sample)}/draw.{draw.epoch:02d}"
    tubelets, kept = _npy(tubelets_RKP.numpy()), _npy(kept_RK.numpy().astype("<i4"))
    return tar_member(f"{name}.npy", tubelets) + tar_member(f"{name}.kept.npy", kept)


def read_draw(cache: TokenCache, draw: Visit) -> tuple[Tensor, Tensor]:
    """Read the tubelets (R, K, P) and the indices (R, K) of a draw.

    Raises:
        DataError: if the draw is damaged, or its shard cannot be read.
    """
    shard, start = cache.place(draw)
    shape = cache.shape
    content = torch.empty(shape.num_bytes, dtype=torch.uint8)
    read_into(shard, start, content.numpy(), CACHE)
    if zlib.crc32(content.numpy().data) != cache.checksum[draw.sample, draw.epoch]:
        raise DataError(f"draw {draw.epoch} of sample {draw.sample} is damaged in {shard}", fix=CACHE.repair)
    kept_at = BLOCK_BYTES + padded(NPY_HEADER_BYTES + shape.tubelet_bytes) + _CONTENT_AT
    tubelets = content[_CONTENT_AT : _CONTENT_AT + shape.tubelet_bytes]
    kept = content[kept_at : kept_at + shape.kept_bytes].view(torch.int32)
    sides = (shape.repeats, shape.num_kept)
    return tubelets.view(*sides, shape.values), kept.view(sides)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ascontiguousarray(array))
    return stream.getvalue()
