"""The linear probe: multinomial logistic regression on the feature vectors of clips.

Features of a masked autoencoder vary far more in a few directions than in the others, which may tell the
classes. The penalty on the weights would hide them, so features are whitened, unless there are too few clips
for that: a held-out part decides between whitened and standardised features.

The fit starts from zero and uses the whole set in every iteration, so every call gives the same result.

Shape legend: N clips, D width, E directions in which features vary, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from everest_ds.probing.accuracy import FeatureSet, TopOne
from everest_ds.probing.splits import held_out

# Factors of the squared weights that are tried, strongest first: each fit starts from the previous one.
PENALTIES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_ITERATIONS = 200
_SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True)
class Standardization:
    """The mean and standard deviation of each feature, over a training set."""

    mean_D: Tensor
    deviation_D: Tensor

    @classmethod
    def of(cls, x_ND: Tensor) -> Standardization:
        """Measure the features of a training set."""
        return cls(x_ND.mean(dim=0), x_ND.std(dim=0) + _SMALLEST_DEVIATION)

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Return features with zero mean and unit variance over the training set."""
        return (x_ND - self.mean_D) / self.deviation_D


@dataclass(frozen=True)
class Whitening:
    """A map to uncorrelated features of unit variance, over a training set."""

    standardize: Standardization
    map_DE: Tensor

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Return the whitened features (N, E)."""
        return self.standardize(x_ND) @ self.map_DE


Coordinates = Callable[[Tensor], Tensor]


def whitened(x_ND: Tensor) -> Coordinates:
    """Return the whitening of a training set, without directions in which its features do not vary."""
    standardize = Standardization.of(x_ND)
    _, value_E, direction_ED = torch.linalg.svd(standardize(x_ND).double(), full_matrices=False)
    varies = value_E > _SMALLEST_DEVIATION * value_E[0]
    scale_E = len(x_ND) ** 0.5 / value_E[varies]
    return Whitening(standardize, (direction_ED[varies].T * scale_E).float())


def standardized(x_ND: Tensor) -> Coordinates:
    """Return the standardisation of a training set."""
    return Standardization.of(x_ND)


COORDINATES = (whitened, standardized)


class Logistic(NamedTuple):
    """A multinomial logistic regression: logits = x W + b."""

    weight_DC: Tensor
    bias_C: Tensor

    def __call__(self, x_ND: Tensor) -> Tensor:
        """Return the logits (N, C)."""
        return torch.addmm(self.bias_C, x_ND, self.weight_DC)


def fit_logistic(
    x_ND: Tensor, label_N: Tensor, num_classes: int, penalty: float, start: Logistic | None = None
) -> Logistic:
    """Minimise the mean cross-entropy plus `penalty` times the sum of the squared weights, with L-BFGS.

    Args:
        x_ND: standardised features.
        label_N: labels below `num_classes`.
        num_classes: number of classes.
        penalty: factor of the squared weights; the bias is free.
        start: weights to start from; None for zero.
    """
    width = x_ND.shape[1]
    first = (
        Logistic(x_ND.new_zeros(width, num_classes), x_ND.new_zeros(num_classes)) if start is None else start
    )
    weights = Logistic(*(tensor.detach().clone().requires_grad_() for tensor in first))
    optimizer = torch.optim.LBFGS(weights, max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(weights(x_ND), label_N) + penalty * weights.weight_DC.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    return Logistic(*(tensor.detach() for tensor in weights))


class Setting(NamedTuple):
    """The coordinates and the penalty of a fit."""

    coordinates: Callable[[Tensor], Coordinates]
    penalty: float


def choose_setting(x_ND: Tensor, label_N: Tensor, num_classes: int) -> Setting:
    """Return the setting with the lowest cross-entropy on a held-out fifth, after a fit on the rest."""
    inner, outer = held_out(label_N)
    found = list[tuple[float, Setting]]()
    for coordinates in COORDINATES:
        move = coordinates(x_ND[inner])
        inside, outside, fit = move(x_ND[inner]), move(x_ND[outer]), None
        for penalty in PENALTIES:
            fit = fit_logistic(inside, label_N[inner], num_classes, penalty, fit)
            loss = F.cross_entropy(fit(outside), label_N[outer])
            found.append((float(loss), Setting(coordinates, penalty)))
    return min(found, key=lambda tried: tried[0])[1]


def linear_probe(train: FeatureSet, test: FeatureSet) -> TopOne:
    """Return the accuracy on `test` of a linear classifier that is fitted on `train`."""
    setting = choose_setting(train.clip_ND, train.label_N, train.num_classes)
    move = setting.coordinates(train.clip_ND)
    fit = fit_logistic(move(train.clip_ND), train.label_N, train.num_classes, setting.penalty)
    return TopOne.of(fit(move(test.clip_ND)).argmax(dim=1), test.label_N)
