"""Writer of a folder for `from_pretrained` of transformers: weights, config and preprocessing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from everest_ds.checkpoints.tensor_file import save_weights
from everest_ds.config import Experiment
from everest_ds.config.backbones import MLP_RATIO
from everest_ds.interchange.files import CONFIG_FILE, PREPROCESSING_FILE, SAFETENSORS_FILE
from everest_ds.interchange.layouts import WeightKind
from everest_ds.models.tubelets import PIXEL_MEAN, PIXEL_STD

_ARCHITECTURES: dict[WeightKind, str] = {
    "pretrain": "VideoMAEForPreTraining",
    "finetune": "VideoMAEForVideoClassification",
    "encoder": "VideoMAEModel",
}


def save_folder(
    folder: Path,
    state: Mapping[str, Tensor],
    kind: WeightKind,
    config: Experiment,
    class_names: list[str] | None,
) -> None:
    """Write weights, config and preprocessing into a folder, whose other files are kept.

    Raises:
        OSError: if the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(state, folder / SAFETENSORS_FILE, {"format": "pt"})
    _write_json(folder / CONFIG_FILE, _config(kind, config, class_names))
    _write_json(folder / PREPROCESSING_FILE, _preprocessing(config))


def _config(kind: WeightKind, config: Experiment, class_names: list[str] | None) -> dict[str, Any]:
    model, encoder, decoder = config.model, config.model.shape.encoder, config.model.shape.decoder
    names = class_names or [f"LABEL_{label}" for label in range(model.num_classes or 0)]
    return {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": "videomae",
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": 3,
        "num_frames": model.num_frames,
        "tubelet_size": model.tubelet_size,
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": MLP_RATIO * encoder.width,
        "hidden_act": "gelu",
        "layer_norm_eps": model.norm_eps,
        "qv_bias": True,
        "use_mean_pooling": kind == "finetune",
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": MLP_RATIO * decoder.width,
        "norm_pix_loss": config.loss.normalize_targets,
        **({"id2label": dict(enumerate(names))} if names else {}),
        **({"label2id": {name: label for label, name in enumerate(names)}} if names else {}),
    }


def _preprocessing(config: Experiment) -> dict[str, Any]:
    side = config.model.image_size
    return {
        "image_processor_type": "VideoMAEImageProcessor",
        "size": {"shortest_edge": side},
        "crop_size": {"height": side, "width": side},
        "image_mean": list(PIXEL_MEAN),
        "image_std": list(PIXEL_STD),
    }


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
