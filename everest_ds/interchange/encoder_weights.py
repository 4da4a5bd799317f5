"""The encoder weights that a run starts from, read from an earlier run or a checkpoint of any system."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.config.schema import ModelConfig
from everest_ds.errors import CheckpointError
from everest_ds.interchange.files import RawWeights, malformed_as_error, open_raw
from everest_ds.interchange.layouts import detect_layout
from everest_ds.interchange.source import as_source
from everest_ds.interchange.tensors import TensorShape
from everest_ds.log import logger

_CLIP = ("num_frames", "image_size")
_CLIP_KEYS = {*_CLIP, "tubelet_size", "patch_size", "positions", "positions_from"}


class EncoderWeights(NamedTuple):
    """Stored weights that include those of an encoder.

    Attributes:
        path: file or folder that is read.
        shapes: shape of each tensor, by its EVEREST-DS name.
        read: function that reads the tensor of a name, as float32.
    """

    path: Path
    shapes: dict[str, TensorShape]
    read: Callable[[str], Tensor]


@contextmanager
def open_encoder(path: Path, config: Experiment) -> Iterator[EncoderWeights]:
    """Open the weights that `model.init_from` names, for the encoder of `config`.

    Args:
        path: a run (its newest checkpoint), or any source that `open_source` accepts.
        config: config of the new run.

    Raises:
        CheckpointError: if the weights cannot be read, or were trained on clips of another shape or with
            other positions.
    """
    with open_raw(path, prefer_best=False) as raw:
        if detect_layout(raw.shapes, raw.path).system == "everest":
            _check_clip(raw.path, _own_settings(raw), config.model)
            yield EncoderWeights(raw.path, raw.shapes, raw.read)
        else:
            source = as_source(raw)
            assumed = {text.partition("=")[0].removeprefix("model.") for text in source.assumed}
            settings = source.config.model.model_dump(include=_CLIP_KEYS - assumed)
            _check_clip(raw.path, settings, config.model)
            yield EncoderWeights(raw.path, source.shapes, source.read)


def _own_settings(raw: RawWeights) -> dict[str, Any]:
    """Return the recorded settings of clips and positions that weights of EVEREST-DS were trained with."""
    with malformed_as_error(raw.path):
        if "config" not in raw.metadata:
            return {}
        model = {"positions_from": None, **json.loads(raw.metadata["config"])["model"]}
        return {key: model[key] for key in _CLIP_KEYS if key in model}


def _check_clip(path: Path, recorded: dict[str, Any], model: ModelConfig) -> None:
    """Check that an encoder meets its tokens at the positions that it learned.

    The shapes of its weights do not show that: tubelets of 2 x 16 x 16 and 8 x 8 x 8 pixels have
    equally many values, and no weight depends on the number of tokens.
    """
    if not set(_CLIP) <= recorded.keys():
        logger.warning("%s does not record its clip shape; taken for the one that this run expects", path)
    own = model.model_dump(include=_CLIP_KEYS)
    learned = own | {"positions_from": None} | dict(model.positions_from or {})
    if own | recorded == own or learned | recorded == learned:
        return
    other = {key: value for key, value in recorded.items() if value != own[key]}
    frames = other.get("num_frames")
    longer = isinstance(frames, int) and frames > model.num_frames
    if other.keys() == {"num_frames"} and longer and model.positions_from is None:
        # A slot has the same positions in longer clips, unless they are interpolated.
        logger.info("encoder of clips of %d frames, used for %d", frames, model.num_frames)
        return
    fix = f"set {_as_overrides(other)}"
    shape = other.keys() - {"positions_from"}
    if shape and shape <= {*_CLIP} and not recorded["positions_from"]:
        clip = {key: recorded.get(key, own[key]) for key in _CLIP}
        fix += f", or {_as_overrides({'positions_from': clip})} to interpolate its positions"
    raise CheckpointError(
        f"{path}: the encoder was trained with another clip shape or other positions than this run's",
        given=_as_overrides({key: own[key] for key in other}),
        allowed=_as_overrides(other),
        fix=fix,
    )


def _as_overrides(settings: dict[str, Any], section: str = "model") -> str:
    """Return settings of a section as they are typed on a command line."""
    return " ".join(
        _as_overrides(value, f"{section}.{key}")
        if isinstance(value, dict)
        else f"{section}.{key}={'null' if value is None else value}"
        for key, value in settings.items()
    )
