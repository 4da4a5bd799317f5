"""Tests of the models, and the experiments, clips and losses that several of them share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.config.selections import SELECTIONS
from everest_ds.models import build_model
from everest_ds.models.pretrain import Reconstruction

TASKS_AND_SELECTIONS = [(task, name) for name, rule in SELECTIONS.items() for task in rule.tasks]


def experiment(
    task: str,
    selection: str,
    keep_ratio: float = 0.3,
    *,
    frame_oversampling: float = 1.0,
    score: str = "embedding",
    distance: str = "l2",
    **model: object,
) -> Experiment:
    """Return a ViT-Tiny experiment on 8 frames at 64 x 64 (4 slots of 16 tokens), changed by `model`."""
    shape = {"backbone": "vit_tiny", "num_frames": 8, "image_size": 64, **model}
    if task == "finetune":
        shape.setdefault("num_classes", 7)
    tokens = {
        "selection": selection,
        "keep_ratio": keep_ratio,
        "frame_oversampling": frame_oversampling,
        "score": score,
        "distance": distance,
    }
    return Experiment.model_validate({"task": task, "model": shape, "tokens": tokens})


def random_clips(config: Experiment, count: int, seed: int = 0) -> Tensor:
    """Return clips of uint8 noise (count, F, H, W, 3), including the candidate frames of IIFS."""
    g = config.candidate_geometry
    generator = torch.Generator().manual_seed(seed)
    size = (count, g.num_frames, g.image_size, g.image_size, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def built(config: Experiment) -> nn.Module:
    """Build the model of `config` with weights that are the same on every call."""
    torch.manual_seed(1)
    return build_model(config)


def loss_of(output: Tensor | Reconstruction) -> Tensor:
    """Return the loss of a model's output; a classifier's clip i has label i."""
    if isinstance(output, Reconstruction):
        return output.loss
    return F.cross_entropy(output, torch.arange(len(output), device=output.device))
