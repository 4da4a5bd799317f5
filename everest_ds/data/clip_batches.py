"""Batches of clips, the input of a model, as the loader returns them.

A clip is a uint8 tensor (frame, row, column, colour); conversion to floating point happens on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from everest_ds.config import Experiment

MISSING = -1  # `item` of a view whose video cannot be read


class ClipBatch(NamedTuple):
    """A batch of clips, the input of a model.

    Attributes:
        clip: uint8 (B, F, H, W, 3).
        label: int64 (B,), -1 if the manifest has no label; float32 (B, classes) after clips were mixed.
        key: int64 (B,), the random keys of the clips.
        item: int64 (B,), indices of the samples (in training) or of the views (in evaluation).
    """

    clip: Tensor
    label: Tensor
    key: Tensor
    item: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The positional arguments of a model's forward pass: clips and keys."""
        return self.clip, self.key

    def to(self, device: torch.device) -> ClipBatch:
        """Return the batch on `device`; the copy is asynchronous if the memory is pinned."""
        return ClipBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


class PackedBatch(NamedTuple):
    """A batch of clips of which the loader's workers selected the tokens.

    Attributes:
        clip: uint8 (B, K, P), the kept tubelets; or (B, F, H, W, 3), clips that stay whole or are unpacked.
        label, key, item: as in a `ClipBatch`.
        kept: int32 (B, K), the indices of the kept tokens, ascending.
    """

    clip: Tensor
    label: Tensor
    key: Tensor
    item: Tensor
    kept: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        """The positional arguments of a model's forward pass: clips, keys and kept tokens."""
        return self.clip, self.key, self.kept.long()

    @property
    def holds_clips(self) -> bool:
        """True if `clip` holds whole clips."""
        return self.clip.dim() > 3

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on `device`; the copy is asynchronous if the memory is pinned."""
        return PackedBatch(*(tensor.to(device, non_blocking=True) for tensor in self))


Batch = ClipBatch | PackedBatch


def blank_batch(config: Experiment, num_clips: int) -> Batch:
    """Return a batch without content, in the form in which a model gets it, to trace the model with."""
    clip = config.candidate_geometry
    size = (num_clips, clip.num_frames, clip.image_size, clip.image_size, 3)
    pixels = torch.empty(size, dtype=torch.uint8)
    label, key, item = (torch.empty(num_clips, dtype=torch.int64) for _ in range(3))
    if not config.tokens.reads_motion:
        return ClipBatch(pixels, label, key, item)
    kept = torch.empty(num_clips, config.token_counts.num_kept, dtype=torch.int32)
    return PackedBatch(pixels, label, key, item, kept)


def map_tensors(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return the batch with `change` applied to each of its tensors."""
    return type(batch)(*map(change, batch))


def padded_batch(batch: Batch, size: int) -> Batch:
    """Return the batch extended to `size` clips by copies of the last clip, marked as `MISSING`."""
    lack = size - len(batch.item)
    if lack <= 0:
        return batch

    def longer(tensor: Tensor) -> Tensor:
        return torch.cat([tensor, tensor[-1:].expand(lack, *tensor.shape[1:])])

    extended = map_tensors(batch, longer)
    extended.item[-lack:] = MISSING
    return extended
