"""Splits of labelled clips: a fifth of every class is held out, by a fixed rule.

Shape legend: N clips.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.probing.accuracy import FeatureSet

EVERY = 5  # every fifth clip of a class is held out


def held_out(label_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of the clips that stay, and of every fifth clip of each class, in their order.

    If no class has five clips, every second clip of a class is held out, and at last the whole set serves for
    both.
    """
    for every in (EVERY, 2):
        rank_N = torch.empty_like(label_N)
        for label in label_N.unique():
            mine = (label_N == label).nonzero().flatten()
            rank_N[mine] = torch.arange(len(mine), device=label_N.device)
        outside = rank_N % every == every - 1
        if outside.any():
            return (~outside).nonzero().flatten(), outside.nonzero().flatten()
    whole = torch.arange(len(label_N), device=label_N.device)
    return whole, whole


def train_and_test(sets: Sequence[FeatureSet]) -> tuple[FeatureSet, FeatureSet]:
    """Return the training and the test set: the two that are given, or the parts of a single one."""
    train, test = sets[0], sets[-1]
    if len(sets) == 1:
        inside, outside = held_out(train.label_N)
        train, test = train.rows(inside), train.rows(outside)
    return train, test


def check_classes(samples: Sequence[Sample], source: str) -> None:
    """Check that probes can learn to tell classes apart from labelled samples.

    Raises:
        DataError: if all samples have one class.
    """
    labels = {sample.label for sample in samples}
    if len(labels) < 2:
        raise DataError(
            f"{source}: a probe needs clips of two or more classes",
            given=f"{len(samples)} clips, all of class {next(iter(labels), None)}",
            fix="name a manifest of several classes",
        )
