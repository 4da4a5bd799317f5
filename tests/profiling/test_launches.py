"""Tests of launch counts, against a list written by hand."""

from __future__ import annotations

import torch

from everest_ds.profiling.launches import count_launches


def test_both_passes_are_counted_and_views_are_not() -> None:
    weight = torch.randn(4, 4, requires_grad=True)

    def step() -> None:
        (torch.ones(4, 4).t()[:2] @ weight).exp().sum().backward()

    launches = count_launches(step).launches
    # Forward launches ones, mm, exp and sum; backward launches the first gradient (ones_like, a fill) and the
    # gradients of exp and mm.
    assert launches["mm"] == 2 and launches["exp"] == 1 and launches["sum"] == 1 and launches["mul"] == 1
    assert not {"t", "transpose", "slice", "expand", "detach"} & set(launches)


def test_every_read_by_the_host_is_a_wait() -> None:
    values = torch.arange(3.0)
    counter = count_launches(lambda: (float(values.sum()), bool(values[0] == 0), values[1].item()))
    assert counter.waits == 3
    assert counter.total == counter.launches["sum"] + counter.launches["eq"] == 2
