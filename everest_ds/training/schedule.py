"""The learning rate of every step: linear warm-up, then a cosine down to `min_lr`. Pure numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from everest_ds.config.schema import ScheduleConfig

REFERENCE_BATCH = 256  # rates are given for so many samples a step, as in VideoMAE


@dataclass(frozen=True)
class Schedule:
    """Learning rates over a run of `total_steps` optimiser steps."""

    total_steps: int
    warmup_steps: int
    warmup_lr: float
    peak_lr: float
    min_lr: float

    def lr(self, step: int) -> float:
        """Rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.warmup_lr + (self.peak_lr - self.warmup_lr) * step / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.peak_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(config: ScheduleConfig, steps_per_epoch: int, samples_per_step: int) -> Schedule:
    """Scale the configured rates to the samples of a step, and epochs to steps."""
    scale = samples_per_step / REFERENCE_BATCH
    return Schedule(
        total_steps=config.epochs * steps_per_epoch,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        warmup_lr=config.warmup_lr * scale,
        peak_lr=config.base_lr * scale,
        min_lr=config.min_lr * scale,
    )
