"""Weights of any system under our names, each accounted for."""

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
from everest_ds.interchange.infer import describe
from everest_ds.interchange.layouts import Kind, Layout, Names, detect
from everest_ds.interchange.tensors import Shape, our_shape, to_ours
from everest_ds.models import build_model
from everest_ds.models.features import FeatureModel
from everest_ds.models.positions import fixed_positions

_POSITIONS = "pos_embed"


class Unused(NamedTuple):
    """A key without a counterpart here, and why it is not needed."""

    key: str
    why: str


@dataclass(frozen=True)
class Source:
    """A model's weights.

    Attributes:
        path: where they are.
        layout: how they are named there.
        config: of the model.
        assumed: settings that nothing in the file tells, as `key=value`.
        class_names: in label order, if the file names them.
        shapes: of every parameter of the model, by our names.
        theirs: what each is called in the file.
        unused: all other keys in the file.
        left_out: what the file holds beside the weights.
        read: a parameter by our name, float32, in our shape.
    """

    path: Path
    layout: Layout
    config: Experiment
    assumed: list[str]
    class_names: list[str] | None
    shapes: dict[str, Shape]
    theirs: dict[str, Names]
    unused: list[Unused]
    left_out: tuple[str, ...]
    read: Callable[[str], Tensor]


def outline_of(config: Experiment, kind: Kind) -> nn.Module:
    """A model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return FeatureModel(config) if kind == "encoder" else build_model(config)


@contextmanager
def open_source(path: Path, overrides: Sequence[str] = (), entry: str | None = None) -> Iterator[Source]:
    """Open weights in whatever layout they are.

    Args:
        path: a run, a checkpoint or a safetensors file of ours; an original's `.pth`; a folder or a
            safetensors file of transformers' VideoMAE.
        overrides: `key.path=value` settings that come before all that is found out.
        entry: of what a training script saved, such as `model_ema`; None: the weights.

    Raises:
        CheckpointError: naming what cannot be read: the file, an unknown layout, a key that is missing, of
            another shape, or that nobody knows.
        ConfigError: if an override does not fit.
    """
    with open_raw(path, entry) as raw:
        yield as_source(raw, overrides)


def as_source(raw: RawWeights, overrides: Sequence[str] = ()) -> Source:
    """Open weights under our names; see `open_source`."""
    layout = detect(raw.shapes, raw.path)
    config, assumed, class_names = describe(layout, raw, overrides)
    model = outline_of(config, layout.kind)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    theirs = {name: layout.theirs(name) for name in shapes}
    _check_shapes(raw, shapes, theirs)
    return Source(
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


def _check_shapes(raw: RawWeights, shapes: dict[str, Shape], theirs: dict[str, Names]) -> None:
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
    """The other keys, each with a reason.

    Raises:
        CheckpointError: at the first that has none: it may be part of what the model computes.
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
                f"{raw.path}: `{key}` is not part of a {layout.system} {layout.kind} model that we know",
                given=f"shape {raw.shapes[key]}",
                fix="remove it from the file if the model's output does not depend on it",
            )
        unused.append(Unused(key, why))
    return unused


def _why_no_positions(raw: RawWeights, config: Experiment) -> str:
    """The positions of these systems are fixed: ours must be the same."""
    model = config.model
    found = raw.read(_POSITIONS).squeeze(0)
    own = fixed_positions(model.positions, model.geometry, model.shape.encoder.width)
    if found.shape != own.shape or not torch.allclose(found, own, rtol=0, atol=1e-5):
        raise CheckpointError(
            f"{raw.path}: `{_POSITIONS}` is not the fixed table that we compute",
            given=f"shape {tuple(found.shape)}",
            allowed=f"{tuple(own.shape)} sines and cosines of model.positions={model.positions}",
            fix="learned positions have no place here; of another clip, set model.num_frames and image_size",
        )
    return f"equals the fixed table of model.positions={model.positions}"
