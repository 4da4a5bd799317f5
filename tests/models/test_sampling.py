"""Tests of per-clip randomness: a hash of key, stream and counter that is uniform and uncorrelated."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from everest_ds.models.sampling import (
    drop_scale,
    drop_scales,
    random_bits,
    random_permutation,
    random_uniform,
)

int64s = st.integers(-(2**63), 2**63 - 1)
streams = st.integers(0, 200)


def splitmix64(value: int) -> int:
    """Apply the published SplitMix64 mixing function to an unbounded integer."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
    return value ^ (value >> 31)


@settings(deadline=None)
@given(key=int64s, stream=streams)
def test_bits_are_splitmix64_of_key_stream_and_counter(key: int, stream: int) -> None:
    gamma = 0x9E3779B97F4A7C15
    state = splitmix64((key + (stream + 1) * gamma) % 2**64)
    expected = [splitmix64((state + i * gamma) % 2**64) >> 1 for i in (1, 2, 3)]
    assert random_bits(torch.tensor([key]), stream, 3)[0].tolist() == expected


@settings(deadline=None)
@given(keys=st.lists(int64s, min_size=1, max_size=6), stream=streams, count=st.integers(1, 50))
def test_numbers_do_not_depend_on_the_rest_of_the_batch(keys: list[int], stream: int, count: int) -> None:
    together = random_bits(torch.tensor(keys), stream, count)
    for row, key in zip(together, keys, strict=True):
        assert torch.equal(row, random_bits(torch.tensor([key]), stream, count)[0])
        assert torch.equal(row, random_bits(torch.tensor([key]), stream, count + 9)[0, :count])


@settings(deadline=None)
@given(key=int64s, stream=streams, count=st.integers(1, 300))
def test_permutation_holds_every_index_once(key: int, stream: int, count: int) -> None:
    order = random_permutation(torch.tensor([key]), stream, count)
    assert order.sort(dim=1).values[0].tolist() == list(range(count))


def test_neighbouring_keys_and_streams_give_unrelated_numbers() -> None:
    keys = torch.arange(1000)
    rows = torch.cat([random_bits(keys, stream, 2) for stream in range(20)]).flatten()
    assert rows.unique().numel() == rows.numel()
    here, there = random_uniform(keys, 0, 1)[:, 0], random_uniform(keys, 1, 1)[:, 0]
    bound = 4 / math.sqrt(len(keys))  # 4 standard deviations of the correlation of independent numbers
    assert abs(correlation(here, there)) < bound
    assert abs(correlation(here[1:], here[:-1])) < bound


@settings(deadline=None)
@given(
    keys=st.lists(int64s, min_size=1, max_size=6),
    stream=streams,
    rates=st.lists(st.floats(0, 0.99), min_size=1, max_size=5),
)
def test_scales_of_many_streams_are_those_of_each(keys: list[int], stream: int, rates: list[float]) -> None:
    key_B = torch.tensor(keys)
    together = drop_scales(key_B, stream, torch.tensor(rates, dtype=torch.float64))
    alone = [drop_scale(key_B, stream + i, 1, rate)[:, 0] for i, rate in enumerate(rates)]
    assert torch.equal(together, torch.stack(alone))


def test_uniform_over_the_numbers_of_a_clip_and_over_clips() -> None:
    for stream in (0, 1, 16, 79):
        assert_uniform(random_uniform(torch.tensor([1234567]), stream, 50_000)[0])
        assert_uniform(random_uniform(torch.arange(50_000), stream, 1)[:, 0])


def test_every_index_is_equally_likely_at_every_place_of_a_permutation() -> None:
    size, draws = 8, 20_000
    order = random_permutation(torch.arange(draws), 3, size)
    for place in range(size):
        counts = torch.bincount(order[:, place], minlength=size).double()
        chi_square = ((counts - draws / size) ** 2 / (draws / size)).sum().item()
        assert chi_square < 27  # 7 degrees of freedom: exceeded with probability 3e-4


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


def assert_uniform(values: Tensor) -> None:
    """Check uniformity with a Kolmogorov-Smirnov test at a significance level of 0.001."""
    assert values.min() >= 0 and values.max() < 1
    n = len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    ordered = values.double().sort().values
    distance = torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max().item()
    assert distance < 1.95 / math.sqrt(n)
