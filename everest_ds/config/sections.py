"""The base class and value types of config sections, and the sections about loss, optimiser and schedule."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Ratio = Annotated[float, Field(gt=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0.0)]
Epsilon = Annotated[float, Field(gt=0.0)]


class ConfigSection(BaseModel):
    """A section of the config: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class LossConfig(ConfigSection):
    """The settings of the training loss."""

    normalize_targets: bool = Field(True, description="normalise target pixels per tubelet (pre-training)")
    label_smoothing: Probability = Field(0.0, description="fine-tuning only")


class OptimizerConfig(ConfigSection):
    """The settings of AdamW. Biases, norms and the mask token get no weight decay."""

    betas: tuple[Probability, Probability] = Field((0.9, 0.95), description="decay rates of the moments")
    eps: Epsilon = Field(1e-8, description="added to the denominator of the update")
    weight_decay: NonNegative = Field(0.05, description="decay of the weight matrices")
    layer_decay: Ratio = Field(
        1.0, description="learning-rate factor from each encoder block to the block below"
    )
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = Field(None, description="largest global norm")


REFERENCE_BATCH = 256  # samples per optimiser step for which learning rates are configured, as in VideoMAE


class ScheduleConfig(ConfigSection):
    """The learning-rate schedule: linear warm-up, then cosine decay.

    All three rates are scaled by `rate_scale`.
    """

    epochs: PositiveInt = Field(800, description="passes over the training videos, warm-up included")
    warmup_epochs: NonNegative = Field(40, description="epochs of the linear warm-up; may be a fraction")
    base_lr: Annotated[float, Field(gt=0)] = Field(1.5e-4, description="rate at the peak, for 256 samples")
    warmup_lr: NonNegative = Field(1e-6, description="rate of the first step")
    min_lr: NonNegative = Field(1e-5, description="rate at the end of the cosine decay")

    def rate_scale(self, samples_per_step: int) -> float:
        """Return the factor that scales all three rates at this number of samples per optimiser step."""
        return samples_per_step / REFERENCE_BATCH
