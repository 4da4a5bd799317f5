"""Copies of a rank's states in host memory, from which a checkpoint is written while training runs on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class HostCopies:
    """Host memory that is kept from one checkpoint to the next; page-locked if states are on a GPU.

    Copies into page-locked memory run at the link's speed, one behind the other, and the host waits for none
    of them. They are queued on the stream of the training steps: the next step's kernels wait until all are
    made, which takes as long as the link needs, so that no step changes a state before it is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(0)
        self._made: torch.cuda.Event | None = None

    def take(self, sizes: Sequence[int], sources: Iterable[Tensor]) -> list[Tensor]:
        """Copy float32 `sources` of so many values each. Those of the last call are overwritten.

        Returns:
            the copies, in order; on a GPU their values are there after `wait`.
        """
        on_gpu, total = self._device.type == "cuda", sum(sizes)
        if self._memory.numel() < total:
            self._memory = torch.empty(0)  # freed before the larger one is made
            self._memory = torch.empty(total, pin_memory=on_gpu)
        copies = list(self._memory[:total].split(list(sizes)))
        for copy, source in zip(copies, sources, strict=True):
            copy.copy_(source, non_blocking=True)
        if on_gpu:
            self._made = torch.cuda.Event()
            self._made.record()
        return copies

    def wait(self) -> None:
        """Return when the copies are made. Any thread may call this."""
        if self._made is not None:
            self._made.synchronize()
