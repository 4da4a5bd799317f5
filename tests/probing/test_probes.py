"""Tests of the probes against naive references, on features whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from everest_ds.probing import attentive_probe, linear_probe, neighbours
from everest_ds.probing.accuracy import FeatureSet, TopOne
from everest_ds.probing.attentive_probe import AttentivePool
from everest_ds.probing.effective_rank import rank_me
from everest_ds.probing.linear_probe import (
    Standardization,
    choose_setting,
    fit_logistic,
    standardized,
    whitened,
)
from everest_ds.probing.neighbours import neighbour_probe, neighbour_votes
from everest_ds.probing.scores import score
from everest_ds.probing.splits import held_out, train_and_test


def blobs(
    num_clips: int, width: int = 8, classes: int = 3, distance: float = 2.0, seed: int = 0
) -> FeatureSet:
    """Return features in Gaussian blobs, one per class, about a common mean."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(num_clips) % classes
    x = 5 + torch.randn(num_clips, width, generator=generator) + distance * torch.eye(width)[label]
    return FeatureSet(x, label)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # Table I of Newcombe, Statistics in Medicine 17 (1998), method 3.
    [
        (81, 263, 25.53, 36.62),
        (15, 148, 6.24, 16.05),
        (0, 20, 0.0, 16.11),
        (1, 29, 0.61, 17.18),
        (29, 29, 88.3, 100),
    ],
)
def test_intervals_have_the_published_ends(correct: int, total: int, low: float, high: float) -> None:
    assert TopOne(correct, total).interval_pct == pytest.approx((low, high), abs=0.006)


def test_the_linear_fit_has_the_weights_of_plain_gradient_descent() -> None:
    train, penalty = blobs(60), 1e-2
    x = Standardization.of(train.clip_ND)(train.clip_ND)
    fit = fit_logistic(x, train.label_N, 3, penalty)
    values, onehot = x.double().numpy(), np.eye(3)[train.label_N.numpy()]
    weight, bias = np.zeros((8, 3)), np.zeros(3)
    for _ in range(1200):
        logits = values @ weight + bias
        share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        weight -= 0.6 * (values.T @ (share - onehot) / 60 + 2 * penalty * weight)
        bias -= 0.6 * (share - onehot).mean(axis=0)
    np.testing.assert_allclose(fit.weight_DC.numpy(), weight, atol=2e-4)
    np.testing.assert_allclose((fit.bias_C - fit.bias_C.mean()).numpy(), bias - bias.mean(), atol=2e-4)


@pytest.mark.parametrize(
    ("num_clips", "shared", "expected"), [(600, 20.0, whitened), (60, 0.0, standardized)]
)
def test_the_setting_is_the_one_with_the_lowest_loss_on_the_held_out_fifth(
    monkeypatch: pytest.MonkeyPatch, num_clips: int, shared: float, expected: Callable[[Tensor], Any]
) -> None:
    """Classes differ in directions of little variance, which whitening finds if there are enough clips."""
    penalties = (1e-1, 1e-2, 1e-3)
    monkeypatch.setattr(linear_probe, "PENALTIES", penalties)
    train = blobs(num_clips, width=40, distance=1.5)
    x = train.clip_ND @ (torch.eye(40) + shared * torch.ones(40, 40))
    inner, outer = held_out(train.label_N)
    loss: dict[tuple[Any, ...], float] = {}
    for coordinates, penalty in product(linear_probe.COORDINATES, penalties):
        move = coordinates(x[inner])
        fit = fit_logistic(move(x[inner]), train.label_N[inner], 3, penalty)
        value = torch.nn.functional.cross_entropy(fit(move(x[outer])), train.label_N[outer])
        loss[coordinates, penalty] = float(value)
    chosen = choose_setting(x, train.label_N, 3)
    assert loss[chosen] == pytest.approx(min(loss.values()), rel=1e-2)
    assert chosen.coordinates == expected


def test_whitened_features_are_uncorrelated_with_unit_variance() -> None:
    x = blobs(50, width=6).clip_ND @ torch.randn(6, 9, generator=torch.Generator().manual_seed(3))
    z = whitened(x)(x)
    assert z.shape == (50, 6)  # the other three directions are combinations of these
    torch.testing.assert_close(z.T @ z / 50, torch.eye(6), rtol=0, atol=1e-3)


def test_neighbours_vote_as_in_a_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "NEIGHBOURS", 5)
    train, test = blobs(40), blobs(10, seed=1)
    votes = neighbour_votes(train.clip_ND, train.label_N, test.clip_ND, 3)
    for row, x in zip(votes, test.clip_ND, strict=True):
        cosines = [float(x @ y / (x.norm() * y.norm())) for y in train.clip_ND]
        expected = [0.0] * 3
        for index in sorted(range(40), key=lambda i: -cosines[i])[:5]:
            expected[int(train.label_N[index])] += math.exp(cosines[index] / 0.07)
        assert row.tolist() == pytest.approx(expected, rel=1e-3)


def test_the_effective_rank_of_known_spectra() -> None:
    assert rank_me(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert rank_me(torch.arange(1.0, 9)[:, None] * torch.ones(6)) == pytest.approx(1, abs=1e-4)
    # Two singular values, 3 and 1: the entropy of (3/4, 1/4).
    expected = math.exp(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert rank_me(torch.diag(torch.tensor([3.0, 1.0, 0.0]))) == pytest.approx(expected, abs=1e-4)


def test_the_attentive_pool_is_multi_head_cross_attention_of_one_query() -> None:
    torch.manual_seed(0)
    width, cells = 128, torch.randn(4, 6, 128)
    filled = torch.ones(4, 6, dtype=torch.bool)
    filled[1, 2:] = False
    keys, values = (Standardization(torch.randn(width), torch.rand(width) + 0.5) for _ in range(2))
    pool = AttentivePool(keys, values, num_classes=3)
    torch.nn.init.normal_(pool.query_HD)
    torch.nn.init.normal_(pool.linear.weight)
    for clip in range(4):
        x = cells[clip][filled[clip]]
        heads = []
        for query, value in zip(pool.query_HD, pool.value_HDd, strict=True):
            attention = (keys(x) @ query / math.sqrt(width)).softmax(dim=0)
            heads.append((attention[:, None] * (values(x) @ value)).sum(dim=0))
        expected = pool.linear(torch.cat(heads))
        torch.testing.assert_close(pool(cells, filled)[clip], expected, rtol=1e-4, atol=1e-4)


def marked(num_clips: int, seed: int) -> FeatureSet:
    """Return clips of which one cell is marked: only its second feature tells the class."""
    generator = torch.Generator().manual_seed(seed)
    label, rows = torch.arange(num_clips) % 2, torch.arange(num_clips)
    cells = torch.randn(num_clips, 12, 16, generator=generator)
    cells[:, :, 0] = 0
    place = torch.randint(12, (num_clips,), generator=generator)
    cells[rows, place, 0] = 6
    cells[rows, place, 1] = 3 * (2 * label - 1).float()
    return FeatureSet(cells.mean(dim=1), label, cells.half())


def test_the_attentive_probe_finds_the_cell_that_tells_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attentive_probe, "_STEPS_AT_LEAST", 200)
    train, test = marked(400, seed=0), marked(200, seed=1)
    torch.manual_seed(5)
    found = score(train, test)
    assert found.attentive is not None and found.attentive.pct > found.linear.pct + 5 > 55
    torch.manual_seed(6)
    assert score(train, test) == found  # nothing is drawn from the state of the process


def test_every_fifth_clip_of_each_class_is_held_out() -> None:
    label = torch.tensor([0] * 11 + [1] * 3 + [0, 1, 1])
    inside, outside = held_out(label)
    assert outside.tolist() == [4, 9, 16]
    assert sorted([*inside.tolist(), *outside.tolist()]) == list(range(17))
    train, test = train_and_test([FeatureSet(torch.eye(17), label)])
    assert torch.equal(test.clip_ND, torch.eye(17)[outside]) and len(train.label_N) == 14


def test_probes_learn_what_is_there_and_chance_otherwise() -> None:
    train, test = blobs(300), blobs(150, seed=1)
    assert linear_probe.linear_probe(train, test).pct > 85 and neighbour_probe(train, test).pct > 80
    shuffled = train._replace(
        label_N=train.label_N[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    )
    low, high = linear_probe.linear_probe(shuffled, test).interval_pct
    assert low < 100 / 3 < high
