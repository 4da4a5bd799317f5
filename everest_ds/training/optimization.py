"""The learning-rate schedule: linear warm-up, then cosine decay to `min_lr`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from everest_ds.config.schema import ScheduleConfig

REFERENCE_BATCH = 256  # configured rates apply to this many samples per step, as in VideoMAE


@dataclass(frozen=True)
class Schedule:
    """Learning rates over a run of `total_steps` optimiser steps."""

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
    scale = samples_per_step / REFERENCE_BATCH
    return Schedule(
        total_steps=config.epochs * steps_per_epoch,
        warmup_steps=round(config.warmup_epochs * steps_per_epoch),
        warmup_lr=config.warmup_lr * scale,
        peak_lr=config.base_lr * scale,
        min_lr=config.min_lr * scale,
    )
