"""The initial weights of a run, and loading of weights into a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.errors import CheckpointError
from everest_ds.interchange.encoder_weights import EncoderWeights, open_encoder
from everest_ds.log import logger
from everest_ds.models.initial_weights import NamedTensor, draw_initial_weights, outline
from everest_ds.parallel.sharded_init import InitialWeights

ENCODER = "encoder."
_Shapes = dict[str, tuple[int, ...]]


def load_encoder(model: nn.Module, config: Experiment, source: Path) -> Path:
    """Load the encoder of `model` from the weights at `source`; other parameters are left unchanged.

    Returns:
        The path of the file or checkpoint that was read.

    Raises:
        CheckpointError: if the encoder at `source` has another architecture.
    """
    with open_encoder(source, config) as stored:
        tensors = {name: stored.read(name) for name in _encoders(stored.shapes)}
        copy_tensors(model, tensors, stored.path, prefix=ENCODER)
        return stored.path


@contextmanager
def initial_weights(config: Experiment, init_from: Path | None) -> Iterator[InitialWeights]:
    """Provide the initial weights of a run: drawn from its seed, with the encoder of `init_from` if given.

    The weights are read one tensor at a time while the context is open.

    Raises:
        CheckpointError: if the encoder at `init_from` has another architecture.
    """
    if init_from is None:
        yield partial(draw_initial_weights, config)
        return
    with open_encoder(init_from, config) as stored:
        shapes = {name: tuple(p.shape) for name, p in outline(config).named_parameters()}
        _check_same_shapes(_encoders(shapes), _encoders(stored.shapes), stored.path)
        logger.info("encoder weights from %s", stored.path)
        yield partial(_with_encoder_of, stored, config)


def _with_encoder_of(stored: EncoderWeights, config: Experiment) -> Iterator[NamedTensor]:
    replaced = _encoders(stored.shapes)
    for name, drawn in draw_initial_weights(config):
        yield name, stored.read(name) if name in replaced else drawn


def _encoders(shapes: _Shapes) -> _Shapes:
    return {name: shape for name, shape in shapes.items() if name.startswith(ENCODER)}


def copy_tensors(model: nn.Module, tensors: dict[str, Tensor], file: Path, prefix: str = "") -> None:
    """Copy `tensors` into all parameters of `model` that start with `prefix`.

    Raises:
        CheckpointError: if a parameter is missing, unexpected or of another shape; the error names it.
    """
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters() if name.startswith(prefix)}
    _check_same_shapes(wanted, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, file)
    model.load_state_dict(tensors, strict=False)


def _check_same_shapes(wanted: _Shapes, found: _Shapes, file: Path) -> None:
    for name in [*wanted, *found]:
        here, there = wanted.get(name), found.get(name)
        if here is None or here != there:
            raise CheckpointError(
                f"{file}: weights of another architecture, at `{name}`",
                given="absent" if there is None else f"shape {there}",
                allowed="absent" if here is None else f"shape {here}",
                fix="use the model section of the config of the run that wrote the file",
            )
