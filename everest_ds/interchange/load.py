"""Models as a library: weights of a run, a file or another system in a module that is ready to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from everest_ds.interchange.source import open_source, outline_of
from everest_ds.log import logger


def load_model(source: str | Path, *overrides: str, features: bool = False, entry: str | None = None) -> Any:
    """The model whose weights are at `source`, in evaluation, in float32 on the host.

    A `PretrainModel` or a `Classifier`, or, of an encoder alone, a `FeatureModel`. Each is called with uint8
    clips (B, F, H, W, 3) and int64 keys (B,), which drive what is random: nothing, for `rero` and `none`.

    Args:
        source: a run folder (its best weights, else its newest checkpoint), a checkpoint, a `.safetensors`
            file, an original's `.pth`, or a folder of transformers' VideoMAE.
        overrides: settings, such as `tokens.selection=rero tokens.keep_ratio=0.6` of a dense model.
        features: the encoder and its LayerNorm only: a `FeatureModel`, which gives one vector a clip.
        entry: of what a training script saved, such as `model_ema`; None: the weights.

    Returns:
        The module; `config` is its experiment, `class_names` a list in label order, or None.

    Raises:
        CheckpointError: naming the file or the key that does not fit.
        ConfigError: if an override does not fit.
    """
    with open_source(Path(source), overrides, entry) as stored:
        if stored.assumed:
            logger.warning("%s does not tell its clips; assumed: %s", source, ", ".join(stored.assumed))
        model: Any = outline_of(stored.config, "encoder" if features else stored.layout.kind)
        model.to_empty(device="cpu")
        _compute_buffers(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(stored.read(name))
        model.config, model.class_names = stored.config, stored.class_names
    return model.eval()


def _compute_buffers(model: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the way, which the file's replace
        for module in model.modules():
            if any(True for _ in module.buffers(recurse=False)):
                reset: Any = module.reset_parameters
                reset()
