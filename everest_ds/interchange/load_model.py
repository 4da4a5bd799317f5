"""Library entry point that loads weights of a run, a file or another system into a model ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from everest_ds.interchange.source import open_source, outline_of
from everest_ds.log import logger


def load_model(source: str | Path, *overrides: str, features: bool = False, entry: str | None = None) -> Any:
    """Load the model whose weights are at `source`, in evaluation mode and in float32 on the host.

    The model is a `PretrainModel`, a `Classifier` or, for encoder weights only, a `FeatureModel`. Each model
    is called with uint8 clips (B, F, H, W, 3) and int64 random keys (B,); the keys have no effect on a
    classifier or feature model with selection `rero` or `none` and without IIFS.

    Args:
        source: a run folder (its best weights, else its newest checkpoint), a checkpoint, a `.safetensors`
            file, a `.pth` file of an original training script, or a folder of transformers' VideoMAE.
        overrides: `key.path=value` settings, such as `tokens.selection=rero tokens.keep_ratio=0.6` to run a
            dense model on selected tokens.
        features: load only the encoder and its LayerNorm, as a `FeatureModel`: one vector per clip.
        entry: entry of a training checkpoint to read, such as `model_ema`; None reads the usual weights.

    Returns:
        The module. Its attribute `config` is the experiment, `class_names` a list in label order or None.

    Raises:
        CheckpointError: if the weights cannot be read; the message names the file or key.
        ConfigError: if an override is invalid.
    """
    with open_source(Path(source), overrides, entry) as stored:
        if stored.assumed:
            logger.warning(
                "%s does not define the shape of its clips; assumed: %s", source, ", ".join(stored.assumed)
            )
        model: Any = outline_of(stored.config, "encoder" if features else stored.layout.kind)
        model.to_empty(device="cpu")
        with torch.random.fork_rng(devices=[]):  # resetting also draws weights, which are overwritten
            for module in model.modules():
                if any(True for _ in module.buffers(recurse=False)):
                    module.reset_parameters()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(stored.read(name))
        model.config, model.class_names = stored.config, stored.class_names
    return model.eval()
