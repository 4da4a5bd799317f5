"""Opening of a model for inference, from trained weights or with a recipe's initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from everest_ds.config import load_experiment
from everest_ds.errors import UsageError
from everest_ds.interchange.load_model import load_model
from everest_ds.models import build_model
from everest_ds.models.feature_model import FeatureModel


def open_trained(path: Path, overrides: Sequence[str] = (), features: bool = False) -> Any:
    """Load the model at `path` (see `load_model`) onto the GPU, or onto the CPU if there is no GPU."""
    return load_model(path, *overrides, features=features).to(_best_device())


def open_model(source: str, overrides: Sequence[str] = ()) -> Any:
    """Load the model at `source` like `open_trained`, or build a recipe's model with its initial weights.

    Raises:
        EverestError: if `load_model` or `load_experiment` fails.
        UsageError: if the weights are those of an encoder only.
    """
    path = Path(source)
    if not path.exists() or path.suffix in (".yaml", ".yml"):
        config = load_experiment(source, overrides)
        torch.manual_seed(config.run.seed)
        model: Any = build_model(config).eval()
        model.config = config
        return model.to(_best_device())
    model = open_trained(path, overrides)
    if isinstance(model, FeatureModel):
        raise UsageError(f"{source}: holds an encoder only", allowed="a pre-trained model or a classifier")
    return model


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
