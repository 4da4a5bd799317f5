"""The training loss of each task, given the engine's forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.data.clips import Batch

Forward = Callable[..., Any]
Objective = Callable[[Forward, Batch], Tensor]


def build_objective(config: Experiment) -> Objective:
    """Return the training loss function of the experiment's task."""
    if config.task == "pretrain":
        return lambda forward, batch: forward(*batch.arguments).loss
    smoothing = config.loss.label_smoothing

    def classification_loss(forward: Forward, batch: Batch) -> Tensor:
        logits = forward(*batch.arguments)
        return F.cross_entropy(logits.float(), batch.label, label_smoothing=smoothing)

    return classification_loss
