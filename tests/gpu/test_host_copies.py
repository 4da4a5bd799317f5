"""Tests of copying states from a CUDA device to the host."""

from __future__ import annotations

import torch

from everest_ds.parallel.host_copies import HostCopies
from tests.gpu import ON_CUDA

pytestmark = ON_CUDA


def test_copies_are_page_locked_and_made_before_the_next_step() -> None:
    device = torch.device("cuda")
    copies, state = HostCopies(device), torch.ones(50_000_000, device=device)
    taken = copies.take([state.numel()], [state])
    state.add_(1)  # queued behind the copy
    copies.wait()
    assert taken[0].is_pinned() and bool((taken[0] == 1).all())
