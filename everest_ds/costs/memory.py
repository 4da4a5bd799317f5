"""Predicted peak memory of a training step on one rank, by category, in closed form, without torch.

The peak of a step can occur at one of a few moments: during token scoring, when only the clips are in memory;
while reconstruction targets are made, next to all activations; in the backward pass of any layer, which needs
working memory on top of what that layer and the earlier ones have kept; and, once the activations are freed,
while gradients are reduced or weights are updated. The memory of each moment is added up, and the largest sum
is the peak. The moment differs between configs: the encoder is wide and sees few tokens, the decoder is
narrow and sees many.

The prediction leaves out what libraries allocate for themselves (CUDA's context, cuBLAS) and the
fragmentation of the allocator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.precision import VALUE_BYTES
from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import ZeroSettings
from everest_ds.costs.block import stacks
from everest_ds.costs.layer_memory import (
    Layer,
    gathered_bytes,
    held_bytes,
    layers,
    loss_bytes,
    rank_parameters,
    scoring_bytes,
    target_bytes,
)
from everest_ds.costs.state_memory import StateMemory, state_memory


@dataclass(frozen=True)
class MemoryPrediction:
    """Bytes on one rank at the peak of a training step.

    Attributes:
        parameters: weights, and the fixed position tables.
        master_parameters: float32 copies that the optimiser updates.
        gradients: gradients that exist at the peak.
        optimizer_states: AdamW's two moments.
        inputs: the micro-batch of uint8 clips.
        activations: tensors that the forward pass keeps for the backward pass.
        temporary: working memory of the operators that run at the peak.
        communication_buffers: ZeRO's reduce buckets, and the parameters that ZeRO-3 has gathered.
        peak_at: human-readable name of the moment, such as `backward pass of decoder block 4`.
        host_bytes: bytes offloaded to host memory; not part of the peak.
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
        """Total device memory at the peak, in bytes."""
        return sum(self.parts().values())

    @property
    def step_bytes(self) -> int:
        """Bytes that the forward and backward passes need in addition to states and clips."""
        return self.activations + self.temporary

    def parts(self) -> dict[str, int]:
        """Return the device memory at the peak by category, in bytes."""
        return {name: size for name, size in vars(self).items() if name not in ("peak_at", "host_bytes")}


class PeakCandidate(NamedTuple):
    """A moment of a training step that may be its memory peak; bytes in addition to states and clips."""

    name: str
    activations: int
    temporary: int
    finished_parameters: int = 0  # parameters whose backward pass is over
    in_backward: bool = False


@dataclass(frozen=True)
class PassMemory:
    """Memory of a micro-batch's forward and backward pass on one rank, independent of ZeRO.

    Attributes:
        moments: moments of both passes that may be the peak.
        num_parameters: parameters of this rank's share under tensor parallelism.
        position_bytes: size of the fixed sine-cosine tables over all N tokens, which every rank holds.
        input_bytes: size of the clips.
        host_bytes: activations offloaded to host memory.
    """

    moments: tuple[PeakCandidate, ...]
    num_parameters: int
    position_bytes: int
    input_bytes: int
    host_bytes: int


def predict_memory(
    config: Experiment, num_ranks: int = 1, zero: ZeroSettings | None = None
) -> MemoryPrediction:
    """Predict the peak memory of one rank during the last micro-batch of any step after the first.

    Args:
        config: the experiment.
        num_ranks: number of all ranks; ZeRO partitions its states over the data-parallel ones.
        zero: ZeRO settings that replace those of the config's DeepSpeed file.

    Raises:
        ConfigError: parallelism.tensor does not divide the number of ranks.
    """
    degree = MeshShape.of(config, num_ranks).degrees.data
    passes = predict_passes(config)
    return peak_of(passes, state_memory(config, passes.num_parameters, degree, zero))


def predict_step_bytes(config: Experiment) -> int:
    """Predict the peak bytes of forward and backward pass in addition to states, gradients and clips."""
    return max(moment.activations + moment.temporary for moment in predict_passes(config).moments)


def predict_passes(config: Experiment) -> PassMemory:
    """Predict the part of a config's memory that does not depend on ZeRO's stage, ranks and settings."""
    stack, clip = layers(config), config.candidate_geometry
    position_values = config.model.geometry.num_tokens * sum(each.shape.width for each in stacks(config))
    clip_bytes = clip.num_frames * clip.image_size**2 * 3 + 2 * 8  # RGB in uint8; a key and a label
    return PassMemory(
        moments=tuple(_moments(stack, config)),
        num_parameters=rank_parameters(config),
        position_bytes=position_values * VALUE_BYTES[config.precision],
        input_bytes=config.batch.micro_batch_size * clip_bytes,
        host_bytes=sum(layer.host_bytes for layer in stack),
    )


def peak_of(passes: PassMemory, states: StateMemory) -> MemoryPrediction:
    """Return the memory at the moment of a step that needs most, including ZeRO's states."""
    finished = states.num_parameters
    after = (
        PeakCandidate("reduction of gradients", 0, states.reduction_bytes, finished, in_backward=True),
        PeakCandidate("update of weights", 0, states.update_bytes, finished),
    )

    def total(moment: PeakCandidate) -> int:
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


def _moments(stack: Sequence[Layer], config: Experiment) -> Iterator[PeakCandidate]:
    """Yield the moments of the forward and backward pass through `stack`."""
    kept = list(accumulate(layer.kept_bytes for layer in stack))
    held = held_bytes(config)
    yield PeakCandidate("token scoring", 0, scoring_bytes(config))
    for layer, kept_bytes in zip(stack, kept, strict=True):
        gathered = gathered_bytes(config) if layer.name.startswith(("embedding", "encoder")) else 0
        yield PeakCandidate(
            f"forward pass of {layer.name}", kept_bytes, held + gathered + layer.forward_bytes
        )
    if config.task == "pretrain":
        yield PeakCandidate("reconstruction targets", kept[-1], target_bytes(config))
        yield PeakCandidate("reconstruction loss", kept[-1], loss_bytes(config))
    finished = 0
    for layer, kept_bytes in zip(reversed(stack), reversed(kept), strict=True):
        name = f"backward pass of {layer.name}"
        yield PeakCandidate(name, kept_bytes, layer.backward_bytes, finished, in_backward=True)
        finished += layer.num_parameters


def _gradient_bytes(states: StateMemory, moment: PeakCandidate) -> int:
    return states.gradient_bytes(moment.finished_parameters, moment.in_backward)


def _buffer_bytes(states: StateMemory, moment: PeakCandidate) -> int:
    finished = moment.finished_parameters
    buffers = states.buffer_bytes(finished, moment.in_backward)
    return buffers + (states.scatter_bytes(finished) if moment.in_backward else 0)
