"""Tests of host copies: they hold the states at the time of the call, in memory that is reused."""

from __future__ import annotations

import torch

from everest_ds.parallel.host_copies import HostCopies


def test_copies_are_of_the_moment_and_their_memory_is_kept() -> None:
    copies, states = HostCopies(torch.device("cpu")), [torch.arange(3.0), torch.arange(5.0)]
    first = copies.take([3, 5], states)
    copies.wait()
    for state in states:
        state.add_(1)
    assert [copy.tolist() for copy in first] == [[0, 1, 2], [0, 1, 2, 3, 4]]
    again = copies.take([5], states[1:])
    assert again[0].data_ptr() == first[0].data_ptr()
    assert again[0].tolist() == [1, 2, 3, 4, 5]
