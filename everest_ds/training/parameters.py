"""Parameter groups of the optimiser: weight decay and layer-wise learning rates."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from everest_ds.config.schema import OptimizerConfig


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
