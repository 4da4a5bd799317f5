"""Tests of the models; what several of them build lives here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.models import build_model
from everest_ds.models.pretrain import Reconstruction

TASKS_AND_SELECTIONS = [
    ("pretrain", "rero"),
    ("pretrain", "random"),
    ("pretrain", "tube"),
    ("pretrain", "dual"),
    ("pretrain", "none"),
    ("finetune", "rero"),
    ("finetune", "random"),
    ("finetune", "none"),
]


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
    """An experiment with ViT-Tiny on 8 frames at 64 squared (4 slots of 16), unless `model` says other."""
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
    """uint8 (count, F, H, W, 3) noise, candidate frames included."""
    g = config.candidate_geometry
    generator = torch.Generator().manual_seed(seed)
    size = (count, g.num_frames, g.image_size, g.image_size, 3)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)


def built(config: Experiment) -> nn.Module:
    """The model of `config` with the same weights every time."""
    torch.manual_seed(1)
    return build_model(config)


def loss_of(output: Tensor | Reconstruction) -> Tensor:
    """The loss of a model's output; clip i is of class i."""
    if isinstance(output, Reconstruction):
        return output.loss
    return F.cross_entropy(output, torch.arange(len(output), device=output.device))
