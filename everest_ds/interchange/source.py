"""Weights of any system under the names and shapes of EVEREST-DS, with every key accounted for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.errors import CheckpointError
from everest_ds.interchange.files import RawWeights, open_raw
from everest_ds.interchange.infer import describe_weights
from everest_ds.interchange.layouts import Layout, Names, WeightKind, detect_layout
from everest_ds.interchange.tensors import TensorShape, our_shape, to_ours
from everest_ds.models import build_model
from everest_ds.models.feature_model import FeatureModel
from everest_ds.models.positions import encoder_positions

_POSITIONS = "pos_embed"


class Unused(NamedTuple):
    """A key without a counterpart in EVEREST-DS, and the reason why it is not needed."""

    key: str
    why: str


@dataclass(frozen=True)
class WeightSource:
    """The weights of a model in a file or folder, readable by their EVEREST-DS names.

    Attributes:
        path: file or folder of the weights.
        layout: layout of the names in it.
        config: config of the model.
        assumed: settings that the file does not define, with their assumed values, as `key=value`.
        class_names: class names in label order, if the file defines them.
        shapes: shape of every parameter of the model, by its EVEREST-DS name.
        theirs: names of each parameter in the file, by its EVEREST-DS name.
        unused: all other keys in the file.
        left_out: entries of the file that are not weights.
        read: function that reads a parameter by its EVEREST-DS name, as float32 in the EVEREST-DS shape.
    """

    path: Path
    layout: Layout
    config: Experiment
    assumed: list[str]
    class_names: list[str] | None
    shapes: dict[str, TensorShape]
    theirs: dict[str, Names]
    unused: list[Unused]
    left_out: tuple[str, ...]
    read: Callable[[str], Tensor]


def outline_of(config: Experiment, kind: WeightKind) -> nn.Module:
    """Build a model on the meta device: names and shapes that take no memory."""
    with torch.device("meta"):
        return FeatureModel(config) if kind == "encoder" else build_model(config)


@contextmanager
def open_source(
    path: Path, overrides: Sequence[str] = (), entry: str | None = None
) -> Iterator[WeightSource]:
    """Open weights of any supported layout.

    Args:
        path: a run, a checkpoint or a safetensors file of EVEREST-DS; a `.pth` file of an original training
            script; a checkpoint folder of DeepSpeed; a folder or safetensors file of transformers' VideoMAE.
        overrides: `key.path=value` settings that take precedence over inferred settings.
        entry: entry of a training checkpoint to read, such as `model_ema`; None reads the usual weights.

    Raises:
        CheckpointError: if the file is unreadable, its layout is unknown, or a key is missing, unknown or of
            another shape.
        ConfigError: if an override is invalid.
    """
    with open_raw(path, entry) as raw:
        yield as_source(raw, overrides)


def as_source(raw: RawWeights, overrides: Sequence[str] = ()) -> WeightSource:
    """Translate opened weights to the names of EVEREST-DS; see `open_source`."""
    layout = detect_layout(raw.shapes, raw.path)
    config, assumed, class_names = describe_weights(layout, raw, overrides)
    model = outline_of(config, layout.kind)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    theirs = {name: layout.theirs(name) for name in shapes}
    _check_shapes(raw, shapes, theirs)
    return WeightSource(
        raw.path,
        layout,
        config,
        assumed,
        class_names,
        shapes,
        theirs,
        _unused(raw, layout, config, {key for keys in theirs.values() for key in keys}),
        raw.left_out,
        lambda name: to_ours([raw.read(key) for key in theirs[name]]),
    )


def _check_shapes(raw: RawWeights, shapes: dict[str, TensorShape], theirs: dict[str, Names]) -> None:
    for name, wanted in shapes.items():
        absent = [key for key in theirs[name] if key not in raw.shapes]
        found = None if absent else our_shape([raw.shapes[key] for key in theirs[name]])
        if found != wanted:
            key = (absent or theirs[name])[0]
            raise CheckpointError(
                f"{raw.path}: weights of another architecture, at `{key}`",
                given="absent" if absent else f"shape {found}, as `{name}`",
                allowed=f"shape {wanted}",
            )


def _unused(raw: RawWeights, layout: Layout, config: Experiment, used: set[str]) -> list[Unused]:
    """Return the keys that the model does not use, each with a reason.

    Raises:
        CheckpointError: at the first key without a known reason, since it may affect the model's output.
    """
    unused = []
    for key in raw.shapes:
        if key in used:
            continue
        why = layout.why_unused(key)
        if key == _POSITIONS:
            why = _why_no_positions(raw, config)
        if why is None:
            raise CheckpointError(
                f"{raw.path}: `{key}` is not a known part of a {layout.system} {layout.kind} model",
                given=f"shape {raw.shapes[key]}",
                fix="remove it from the file if the model's output does not depend on it",
            )
        unused.append(Unused(key, why))
    return unused


def _why_no_positions(raw: RawWeights, config: Experiment) -> str:
    """Check that stored positions equal the model's fixed table, and return that as the reason."""
    model = config.model
    found = raw.read(_POSITIONS).squeeze(0)
    own = encoder_positions(model, model.shape.encoder.width)
    if found.shape != own.shape or not torch.allclose(found, own, rtol=0, atol=1e-5):
        raise CheckpointError(
            f"{raw.path}: `{_POSITIONS}` is not the fixed position table of this model",
            given=f"shape {tuple(found.shape)}",
            allowed=f"{tuple(own.shape)} sines and cosines of model.positions={model.positions}",
            fix="for another clip shape, set model.num_frames and model.image_size;"
            " learned positions are not supported",
        )
    return f"equals the fixed table of model.positions={model.positions}"
