"""Copies of a rank's states in host memory, from which a checkpoint is written while training continues."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class HostCopies:
    """A reusable host buffer for the states of a checkpoint; page-locked if the states are on a GPU.

    Copies into page-locked memory run one after another at the speed of the link, and the host waits for none
    of them. They are queued on the stream of the training steps, so the next step's kernels start only when
    all copies are complete, and no step changes a state before it is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0)
        self._made: torch.cuda.Event | None = None

    def take(self, sizes: Sequence[int], sources: Iterable[Tensor]) -> list[Tensor]:
        """Copy float32 `sources`, the i-th of which has `sizes[i]` values. Overwrites the previous copies.

        Returns:
            The copies, in order; on a GPU their values are valid after `wait`.
        """
        on_gpu, total = self._device.type == "cuda", sum(sizes)
        if self._memory.numel() < total:
            self._memory = torch.empty(0)  # freed before the larger buffer is allocated
            self._memory = torch.empty(total, pin_memory=on_gpu)
        copies = list(self._memory[:total].split(list(sizes)))
        for copy, source in zip(copies, sources, strict=True):
            copy.copy_(source, non_blocking=True)
        if on_gpu:
            self._made = torch.cuda.Event()
            self._made.record()
        return copies

    def wait(self) -> None:
        """Wait until the copies are complete. Any thread may call this."""
        if self._made is not None:
            self._made.synchronize()
