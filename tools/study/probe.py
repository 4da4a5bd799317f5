"""The linear probe: accuracy of a linear classifier on the clip features of a frozen encoder.

Shape legend: B clips, D width.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.data.clips import EvaluationClips, evaluation_views
from everest_ds.data.reading import Failure
from everest_ds.models import Classifier
from everest_ds.training.samples import read_samples
from everest_ds.training.weights import load_encoder

_BATCH = 64
_PENALTY = 1e-3  # on the square of the weights, for features of unit variance
_ITERATIONS = 200


def probe(config: Experiment, pretrained: Path, device: torch.device) -> float:
    """Return test top-1, in percent, of a linear probe on the mean of all tokens of an encoder.

    Args:
        config: a dense fine-tuning, whose training videos fit the classifier.
        pretrained: run folder of the pre-training.
        device: device of the encoder and the probe.
    """
    model = Classifier(config)
    load_encoder(model, config, pretrained)
    for name in ("norm", "head"):
        setattr(model, name, nn.Identity())
    model.to(device).eval()
    (x, y), (x_test, y_test) = (features(model, config, split, device) for split in ("train", "test"))
    mean, deviation = x.mean(dim=0), x.std(dim=0) + 1e-6
    weights = fit((x - mean) / deviation, y)
    guess = weights((x_test - mean) / deviation).argmax(dim=1)
    return 100 * (guess == y_test).float().mean().item()


@torch.no_grad()
def features(model: nn.Module, config: Experiment, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the features of the middle clip of every video (B, D), and the labels (B,)."""
    clips = EvaluationClips(read_samples(config, split).samples, config, segments=1, crops=1)
    failures: list[Failure] = []
    parts = [
        (model(here.clip, here.key), here.label)
        for here in (b.to(device) for b in evaluation_views(clips, _BATCH, 0, 1, False, failures.append))
    ]
    x_BD, label_B = (torch.cat(part) for part in zip(*parts, strict=True))
    return x_BD, label_B


def fit(x_BD: Tensor, label_B: Tensor) -> nn.Linear:
    """Fit a multinomial logistic regression, starting from zero so that every call gives the same result."""
    linear = nn.Linear(x_BD.shape[1], int(label_B.max()) + 1, device=x_BD.device)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(linear(x_BD), label_B) + _PENALTY * linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return linear
