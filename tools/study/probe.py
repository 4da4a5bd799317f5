"""The linear probe of the study: test accuracy of a linear classifier on the features of a frozen encoder.

The penalty is fixed, and the features are the mean of all tokens before the LayerNorm, as in every table of
docs/study.md.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from everest_ds.config import Experiment
from everest_ds.data.reading import Failure
from everest_ds.inference.views import Views, over_views
from everest_ds.models import Classifier
from everest_ds.probing.accuracy import FeatureSet, TopOne
from everest_ds.probing.linear_probe import Standardization, fit_logistic
from everest_ds.training.samples import read_samples
from everest_ds.training.weights import load_encoder

_PENALTY = 1e-3


def probe(config: Experiment, pretrained: Path, device: torch.device) -> float:
    """Return test top-1, in percent, of a linear probe on the mean of all tokens of an encoder.

    Args:
        config: a dense fine-tuning, whose training videos fit the classifier.
        pretrained: run folder of the pre-training.
        device: device of the encoder.
    """
    model = Classifier(config)
    load_encoder(model, config, pretrained)
    for name in ("norm", "head"):
        setattr(model, name, nn.Identity())
    model.to(device).eval()
    train, test = (_features(model, config, split) for split in ("train", "test"))
    standardize = Standardization.of(train.clip_ND)
    fit = fit_logistic(standardize(train.clip_ND), train.label_N, train.num_classes, _PENALTY)
    return TopOne.of(fit(standardize(test.clip_ND)).argmax(dim=1), test.label_N).pct


def _features(model: nn.Module, config: Experiment, split: str) -> FeatureSet:
    """Return the features of the middle clip of every video."""
    samples, failures = read_samples(config, split).samples, list[Failure]()
    rows = over_views(model, samples, config, Views(), failures.append, lambda done: None)
    index, features = zip(*rows, strict=True)
    return FeatureSet(torch.stack(features), torch.tensor([samples[i].label for i in index]))
