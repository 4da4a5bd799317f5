"""The linear probe: multinomial logistic regression on the standardised feature vectors of clips.

The fit starts from zero and uses the whole set in every iteration, so every call gives the same result.

Shape legend: N clips, D width, C classes.
"""

from __future__ import annotations

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


class Standardization(NamedTuple):
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


def choose_penalty(x_ND: Tensor, label_N: Tensor, num_classes: int) -> tuple[float, Logistic]:
    """Return the penalty with the lowest cross-entropy on a held-out fifth, and the fit on the rest.

    The search goes from strong to weak penalties and ends when the loss grows.
    """
    inner, outer = held_out(label_N)
    best: tuple[float, float, Logistic] | None = None
    fit = None
    for penalty in PENALTIES:
        fit = fit_logistic(x_ND[inner], label_N[inner], num_classes, penalty, fit)
        loss = float(F.cross_entropy(fit(x_ND[outer]), label_N[outer]))
        if best is not None and loss >= best[0]:
            break
        best = loss, penalty, fit
    assert best is not None
    return best[1:]


def linear_probe(train: FeatureSet, test: FeatureSet) -> TopOne:
    """Return the accuracy on `test` of a linear classifier that is fitted on `train`."""
    standardize, num_classes = Standardization.of(train.clip_ND), train.num_classes
    x_ND = standardize(train.clip_ND)
    penalty, start = choose_penalty(x_ND, train.label_N, num_classes)
    fit = fit_logistic(x_ND, train.label_N, num_classes, penalty, start)
    return TopOne.of(fit(standardize(test.clip_ND)).argmax(dim=1), test.label_N)
