"""Predicted memory of a training step: the peak of one rank and what it is made of, in closed form, no torch.

The peak of a step can lie at few moments: while tokens are scored, when clips are all there is; while
targets are made, next to all activations; in the backward pass of any layer, which works beside what it and
the layers before it have kept; and, with activations gone, while gradients are reduced or weights updated.
Each is added up, and the largest is the peak. Which it is differs: the encoder is wide and sees few tokens,
the decoder is narrow and sees many.

Not in it: what libraries take for themselves (CUDA's context, cuBLAS) and gaps of the allocator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from everest_ds.config.batch import data_parallel_degree
from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import ZeroSettings
from everest_ds.profiling.memory_blocks import VALUE_BYTES
from everest_ds.profiling.memory_layers import (
    Layer,
    gathered_bytes,
    held_bytes,
    layers,
    loss_bytes,
    loss_storage_bytes,
    rank_parameters,
    scoring_bytes,
    target_bytes,
)
from everest_ds.profiling.memory_states import ModelStates, model_states


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes of one rank at the peak of a training step.

    Attributes:
        parameters: weights, and the fixed position tables.
        master_parameters: float32 copies that the optimiser steps.
        gradients: those that are there at the peak.
        optimizer_states: AdamW's two moments.
        inputs: the micro-batch of uint8 clips.
        activations: what the forward pass has left for the backward pass.
        temporary: what the operators of that moment work in.
        communication_buffers: ZeRO's reduce buckets, and the parameters that ZeRO-3 has gathered.
        peak_at: the moment, for people: `backward pass of decoder block 4`.
        host_bytes: in host memory meanwhile, by offload; not a part of the peak.
    """

    parameters: int
    master_parameters: int
    gradients: int
    optimizer_states: int
    inputs: int
    activations: int
    temporary: int
    communication_buffers: int
    peak_at: str
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    @property
    def step_bytes(self) -> int:
        """What forward and backward pass need besides states and clips."""
        return self.activations + self.temporary

    def parts(self) -> dict[str, int]:
        """Bytes by category."""
        return {name: size for name, size in vars(self).items() if name not in ("peak_at", "host_bytes")}


class Moment(NamedTuple):
    """One that may be the peak; bytes beside states and clips."""

    name: str
    activations: int
    temporary: int
    finished_parameters: int = 0  # through with their backward pass
    in_backward: bool = False


@dataclass(frozen=True)
class Passes:
    """Forward and backward pass of a micro-batch on one rank, whatever ZeRO does with its states.

    Attributes:
        moments: of both.
        num_parameters: of this rank's share under tensor parallelism.
        position_bytes: fixed tables.
        input_bytes: the clips.
        host_bytes: activations in host memory.
    """

    moments: tuple[Moment, ...]
    num_parameters: int
    position_bytes: int
    input_bytes: int
    host_bytes: int


def predict_memory(
    config: Experiment, num_ranks: int = 1, zero: ZeroSettings | None = None
) -> MemoryPrediction:
    """Peak memory of one rank, at the last micro-batch of a step that is not the first.

    Args:
        num_ranks: all of them; those that are not tensor parallel share ZeRO's states.
        zero: instead of what the config's DeepSpeed file says.

    Raises:
        ConfigError: if parallelism.tensor does not divide the ranks.
    """
    degree = data_parallel_degree(config, num_ranks)
    passes = predict_passes(config)
    return peak_of(passes, model_states(config, passes.num_parameters, degree, zero))


def predict_step_bytes(config: Experiment) -> int:
    """The most that both passes hold besides states and clips, gradients being there already."""
    return max(moment.activations + moment.temporary for moment in predict_passes(config).moments)


def predict_passes(config: Experiment) -> Passes:
    """What `predict_memory` says of a config, but for ZeRO's stage, ranks and settings."""
    stack = layers(config)
    return Passes(
        moments=tuple(_moments(stack, config)),
        num_parameters=rank_parameters(config),
        position_bytes=_position_bytes(config),
        input_bytes=_input_bytes(config),
        host_bytes=sum(layer.host_bytes for layer in stack),
    )


def peak_of(passes: Passes, states: ModelStates) -> MemoryPrediction:
    """The largest moment, with ZeRO's states added."""
    finished = states.num_parameters
    after = (
        Moment("reduction of gradients", 0, states.reduction_bytes, finished, in_backward=True),
        Moment("update of weights", 0, states.update_bytes, finished),
    )

    def total(moment: Moment) -> int:
        held = _gradient_bytes(states, moment) + _buffer_bytes(states, moment)
        return moment.activations + moment.temporary + held

    moment = max((*passes.moments, *after), key=total)
    return MemoryPrediction(
        parameters=states.parameter_bytes + passes.position_bytes,
        master_parameters=states.master_bytes,
        gradients=_gradient_bytes(states, moment),
        optimizer_states=states.optimizer_bytes,
        inputs=passes.input_bytes,
        activations=moment.activations,
        temporary=moment.temporary,
        communication_buffers=_buffer_bytes(states, moment),
        peak_at=moment.name,
        host_bytes=states.host_bytes + passes.host_bytes,
    )


def _moments(stack: Sequence[Layer], config: Experiment) -> Iterator[Moment]:
    """Forward and backward pass through `stack`."""
    kept = list(accumulate(layer.kept_bytes for layer in stack))
    held, of_loss = held_bytes(config), loss_storage_bytes(config)
    yield Moment("token scoring", 0, scoring_bytes(config))
    for layer, kept_bytes in zip(stack, kept, strict=True):
        gathered = gathered_bytes(config) if layer.name.startswith(("embedding", "encoder")) else 0
        yield Moment(f"forward pass of {layer.name}", kept_bytes, held + gathered + layer.forward_bytes)
    if config.task == "pretrain":
        yield Moment("reconstruction targets", kept[-1], target_bytes(config))
        yield Moment("reconstruction loss", kept[-1], loss_bytes(config))
    finished = 0
    for layer, kept_bytes in zip(reversed(stack), reversed(kept), strict=True):
        name, working = f"backward pass of {layer.name}", layer.backward_bytes + of_loss
        yield Moment(name, kept_bytes, working, finished, in_backward=True)
        finished += layer.num_parameters


def _gradient_bytes(states: ModelStates, moment: Moment) -> int:
    return states.gradient_bytes(moment.finished_parameters, moment.in_backward)


def _buffer_bytes(states: ModelStates, moment: Moment) -> int:
    finished = moment.finished_parameters
    buffers = states.buffer_bytes(finished, moment.in_backward)
    return buffers + (states.scatter_bytes(finished) if moment.in_backward else 0)


def _position_bytes(config: Experiment) -> int:
    """The fixed sine-cosine tables over all N tokens, which every rank has."""
    shape, num_tokens = config.model.shape, config.model.geometry.num_tokens
    widths = shape.encoder.width + (shape.decoder.width if config.task == "pretrain" else 0)
    return num_tokens * widths * VALUE_BYTES[config.precision]


def _input_bytes(config: Experiment) -> int:
    """uint8 pixels, one for each colour; key and label of 8 bytes each."""
    clip = config.candidate_geometry
    pixels = clip.num_frames * clip.image_size**2 * 3
    return config.batch.micro_batch_size * (pixels + 2 * 8)
