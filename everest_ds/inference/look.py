"""Recording of a model's forward pass on one clip, with trained weights or a recipe's initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from everest_ds.config import load_experiment
from everest_ds.errors import UsageError
from everest_ds.inference.views import read_clip
from everest_ds.interchange.load_model import load_model
from everest_ds.models import build_model
from everest_ds.models.feature_model import FeatureModel
from everest_ds.models.watch import Seen, Watch


def open_model(source: str, overrides: Sequence[str] = ()) -> Any:
    """Load the model at `source` in evaluation mode, or build a recipe's model with its initial weights.

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
        return model
    model = load_model(path, *overrides)
    if isinstance(model, FeatureModel):
        raise UsageError(f"{source}: holds an encoder only", allowed="a pre-trained model or a classifier")
    return model


@torch.no_grad()
def watch_video(model: Any, video: Path) -> Seen:
    """Run `model` on the middle clip of a video, and return the recorded tokens and attention.

    Raises:
        DataError: if the video cannot be read or is too short.
    """
    batch = read_clip(video, model.config).to(next(model.parameters()).device)
    with Watch(model) as watched:
        output = model(*batch.arguments)
    return watched.seen(output)
