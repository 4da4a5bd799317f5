"""Inference of a model's config from the shapes of its weights and the descriptions in its file."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from everest_ds.config import Experiment, build_experiment
from everest_ds.config.backbones import BACKBONES
from everest_ds.config.selections import SELECTIONS
from everest_ds.data.video_list import read_class_names
from everest_ds.errors import CheckpointError, ConfigError
from everest_ds.interchange.files import PREPROCESSING_FILE, RawWeights, malformed_as_error
from everest_ds.interchange.layouts import EMBEDDING, Layout
from everest_ds.models.tubelets import PIXEL_MEAN, PIXEL_STD

InferredTree = dict[str, Any]
# config.json does not define this epsilon: transformers uses PyTorch's default for the last LayerNorm.
TRANSFORMERS_LAST_EPS = 1e-5
# Arguments and mask types of the original training scripts -> keys and values of the config.
_ARGUMENTS = {"num_frames": "num_frames", "input_size": "image_size"}
_MASKS = {"tube": "tube", "random": "none", "motion-centric": "rero"}
# Settings that a file of weights may not define, with the values of all released models.
_USUAL: InferredTree = {"num_frames": 16, "image_size": 224, "tubelet_size": 2}


class Described(NamedTuple):
    """The inferred config of a model.

    Attributes:
        config: config of the model.
        assumed: settings that the file does not define, with their assumed values, as `key=value`.
        class_names: class names in label order, if the file or its run defines them.
    """

    config: Experiment
    assumed: list[str]
    class_names: list[str] | None


def describe_weights(layout: Layout, raw: RawWeights, overrides: Sequence[str]) -> Described:
    """Infer the config of the model that the weights belong to.

    Args:
        layout: layout of the weights.
        raw: the weights and their descriptions.
        overrides: `key.path=value` settings that take precedence over inferred settings.

    Raises:
        CheckpointError: if the model has an architecture that EVEREST-DS does not support.
        ConfigError: if an override is invalid.
    """
    with malformed_as_error(raw.path):
        told = _told(layout, raw)
        told["model"] = dict(told["model"])
    given = {text.partition("=")[0] for text in overrides}
    missing = {key: value for key, value in _USUAL.items() if key not in told["model"]}
    told["model"] = {**missing, **told["model"]}
    assumed = [f"model.{key}={value}" for key, value in missing.items() if f"model.{key}" not in given]
    try:
        config = build_experiment(told, overrides, raw.path)
    except ConfigError as error:
        if overrides:
            raise
        raise CheckpointError(str(error)) from None
    with malformed_as_error(raw.path):
        return Described(config, assumed, _class_names(raw, config))


def _told(layout: Layout, raw: RawWeights) -> InferredTree:
    if layout.system == "everest" and "config" in raw.metadata:
        own: InferredTree = json.loads(raw.metadata["config"])
        return own
    said = _by_transformers(layout, raw) if raw.transformers else _by_arguments(raw.arguments)
    task = "finetune" if layout.normalizes_mean else "pretrain"
    tokens = {"selection": "tube" if layout.kind == "pretrain" else "none", **said.get("tokens", {})}
    positions = {"positions": "grid"} if layout.system == "mvd" else {}
    model = {**said.get("model", {}), **positions, **_shape(layout, raw)}
    return {"task": task, **said, "tokens": tokens, "model": model}


def _shape(layout: Layout, raw: RawWeights) -> InferredTree:
    """Infer the settings of section `model` that the shapes of the weights determine."""
    (embedding,) = layout.theirs(EMBEDDING)
    shape = raw.shapes[embedding]
    if len(shape) not in (2, 5):
        raise CheckpointError(
            f"{raw.path}: `{embedding}` is not a tubelet embedding",
            given=f"shape {shape}",
            allowed="(width, 3, frames, rows, columns)",
        )
    depth = _depth(layout, raw, "encoder.blocks")
    backbone = _backbone(raw.path, shape[0], depth)
    tree: InferredTree = {"backbone": backbone}
    if len(shape) == 5:
        tree |= {"tubelet_size": shape[2], "patch_size": shape[3]}
    else:
        tree["patch_size"] = math.isqrt(shape[1] // (3 * _USUAL["tubelet_size"]))
    if layout.kind == "pretrain":
        decoder_depth = _depth(layout, raw, "decoder")
        if decoder_depth != BACKBONES[backbone].decoder.depth:
            tree["decoder_depth"] = decoder_depth
    if layout.normalizes_mean:
        head = layout.theirs("head.weight")
        # A config of a classifier needs a number of classes; without a head, nothing depends on it.
        tree["num_classes"] = (
            raw.shapes[head[0]][0] if head else max(2, len(raw.transformers.get("id2label", ())))
        )
    return tree


def _depth(layout: Layout, raw: RawWeights, stack: str) -> int:
    (first,) = layout.theirs(f"{stack}.0.norm1.weight")
    pattern = re.escape(first).replace(r"\.0\.", r"\.(\d+)\.")
    return sum(re.fullmatch(pattern, name) is not None for name in raw.shapes)


def _backbone(path: Path, width: int, depth: int) -> str:
    for name, backbone in BACKBONES.items():
        if (backbone.encoder.width, backbone.encoder.depth) == (width, depth):
            return name
    known = (f"{name} {b.encoder.width} x {b.encoder.depth}" for name, b in BACKBONES.items())
    raise CheckpointError(
        f"{path}: the encoder matches no known backbone",
        given=f"width {width}, {depth} blocks",
        allowed=", ".join(known),
    )


def _by_transformers(layout: Layout, raw: RawWeights) -> InferredTree:
    said = raw.transformers
    width, depth = said.get("hidden_size", 768), said.get("num_hidden_layers", 12)
    heads = BACKBONES[_backbone(raw.path, width, depth)].encoder.heads
    for key, allowed in {
        "model_type": "videomae",
        "num_attention_heads": heads,
        "hidden_act": "gelu",
        "num_channels": 3,
    }.items():
        if said.get(key, allowed) != allowed:
            raise CheckpointError(
                f"{raw.path}: config.json: `{key}` is not supported", given=said[key], allowed=allowed
            )
    _check_normalization(raw)
    _check_last_norm(layout, raw)
    names = ("image_size", "patch_size", "num_frames", "tubelet_size")
    model: InferredTree = {name: said[name] for name in names if name in said}
    model["norm_eps"] = said.get("layer_norm_eps", 1e-12)
    model["last_norm_eps"] = TRANSFORMERS_LAST_EPS
    return {"model": model, "loss": {"normalize_targets": said.get("norm_pix_loss", True)}}


def _check_normalization(raw: RawWeights) -> None:
    for key, ours in {"image_mean": PIXEL_MEAN, "image_std": PIXEL_STD}.items():
        theirs = raw.preprocessing.get(key, ours)
        if not all(math.isclose(a, b, abs_tol=1e-6) for a, b in zip(theirs, ours, strict=True)):
            raise CheckpointError(
                f"{raw.path.parent / PREPROCESSING_FILE}: this checkpoint normalises pixels with other"
                f" statistics than ImageNet's",
                given=f"{key} {theirs}",
                allowed=list(ours),
                fix="correct that file if the model was trained with ImageNet's statistics and the file holds"
                " only a default; models of other statistics are not supported",
            )


def _check_last_norm(layout: Layout, raw: RawWeights) -> None:
    """Check that a pre-trained encoder of transformers has its last LayerNorm."""
    (norm,) = layout.theirs("norm.weight")
    if layout.kind == "pretrain" and norm not in raw.shapes:
        raise CheckpointError(
            f"{raw.path}: the encoder has no last LayerNorm `{norm}`",
            given=f"use_mean_pooling {raw.transformers.get('use_mean_pooling', True)} in config.json",
            allowed="false, as in the released models: transformers leaves this norm out otherwise",
            fix="pre-train with VideoMAEConfig(use_mean_pooling=False), or fine-tune the model first",
        )


def _by_arguments(said: Mapping[str, Any]) -> InferredTree:
    """Translate the arguments of an original training script into config settings."""
    model: InferredTree = {ours: said[theirs] for theirs, ours in _ARGUMENTS.items() if theirs in said}
    if "use_cls_token" in said:  # only MVD's scripts have this argument
        model["positions"] = "grid"
    data: InferredTree = {"frame_stride": said["sampling_rate"]} if "sampling_rate" in said else {}
    if said.get("data_set") == "SSV2":
        data["sampling"] = "segments"
    return {"model": model, "tokens": _tokens(said), "data": data}


def _tokens(said: Mapping[str, Any]) -> InferredTree:
    if said.get("mcm"):  # EVEREST's fine-tuning
        return {"selection": "rero", "keep_ratio": _kept(said["mcm_ratio"])}
    if said.get("mask_type") not in _MASKS:
        return {}
    tokens: InferredTree = {"selection": _MASKS[said["mask_type"]], "mask_ratio": said["mask_ratio"]}
    if "pretrain" in SELECTIONS[tokens["selection"]].shares:
        tokens["keep_ratio"] = _kept(said["motion_centric_masking_ratio"])
    return tokens


def _kept(dropped: float) -> float:
    return round(1 - dropped, 10)  # 0.3 rather than the binary result of 1 - 0.7


def _class_names(raw: RawWeights, config: Experiment) -> list[str] | None:
    if "classes" in raw.metadata:
        names: list[str] = json.loads(raw.metadata["classes"])
        return names
    labels: dict[str, str] = raw.transformers.get("id2label", {})
    names = [labels[key] for key in sorted(labels, key=int)]
    if config.data.class_names is not None and config.data.class_names.is_file():  # weights of a run
        names = read_class_names(config.data.class_names)
    unnamed = [f"LABEL_{number}" for number in range(len(names))]
    return names if names and names != unnamed else None
