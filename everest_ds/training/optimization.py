"""The loss, the parameter groups and the learning-rate schedule that a run optimises with."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.config.sections import OptimizerConfig, ScheduleConfig
from everest_ds.data.clip_batches import Batch

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


@dataclass(frozen=True)
class Schedule:
    """Learning rates over a run of `total_steps` optimiser steps: linear warm-up, then cosine decay."""

    total_steps: int
    warmup_steps: int
    warmup_lr: float
    peak_lr: float
    min_lr: float

    def lr(self, step: int) -> float:
        """Return the learning rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(config: ScheduleConfig, steps_per_epoch: int, samples_per_step: int) -> Schedule:
    """Build the schedule: scale the configured rates by the samples per step, and convert epochs to steps."""
    scale = config.rate_scale(samples_per_step)
    return Schedule(
        total_steps=config.epochs * steps_per_epoch,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        warmup_lr=config.warmup_lr * scale,
        peak_lr=config.base_lr * scale,
        min_lr=config.min_lr * scale,
    )


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups, with weight decay for matrices only.

    Vectors (biases, norms, mask token) are not decayed. Each group has an `lr_scale`, which is layer_decay **
    (distance of the layer from the head), as in the fine-tuning of BEiT and VideoMAE. Layer 0 is the
    embedding, layer i + 1 is encoder block i, and all other parameters belong to the top layer.
    """
    top = 1 + max((_layer(name, 0) for name, _ in model.named_parameters()), default=0)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        layer, decayed = _layer(name, top), parameter.ndim > 1
        group = groups.setdefault(
            (layer if config.layer_decay < 1 else top, decayed),
            {
                "params": [],
                "weight_decay": config.weight_decay if decayed else 0.0,
                "lr_scale": config.layer_decay ** (top - layer),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layer(name: str, top: int) -> int:
    if name.startswith("encoder.embed."):
        return 0
    block = re.match(r"encoder\.blocks\.(\d+)\.", name)
    return int(block[1]) + 1 if block else top
