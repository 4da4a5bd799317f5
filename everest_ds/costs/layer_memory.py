"""Predicted activation memory of this project's models, layer by layer, in closed form, without torch.

Symbols as in compute.py: B clips per micro-batch, N tokens, K kept, V visible, M = K - V predicted, P values
per tubelet, D encoder width, d decoder width, e bytes per value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from everest_ds.config.precision import FLOAT32_BYTES, VALUE_BYTES
from everest_ds.config.schema import Experiment
from everest_ds.config.selections import GPU_CHUNK_TOKENS
from everest_ds.costs import block
from everest_ds.costs.activation_memory import BlockMemory, block_memory
from everest_ds.costs.compute import count_parameters


class Layer(NamedTuple):
    """The memory of one part of the model.

    Attributes:
        name: human-readable name, such as `decoder block 4`.
        kept_bytes: bytes that its forward pass keeps for its backward pass.
        backward_bytes: peak of bytes that its backward pass adds to `kept_bytes`.
        num_parameters: number of its parameters on this rank.
        forward_bytes: working memory of its forward pass; 0 where that cannot be a peak.
        host_bytes: bytes that its forward pass keeps in host memory.
    """

    name: str
    kept_bytes: int
    backward_bytes: int
    num_parameters: int
    forward_bytes: int = 0
    host_bytes: int = 0


def layers(config: Experiment) -> list[Layer]:
    """Return one rank's share of the model's layers, in the order of the forward pass."""
    in_encoder, *in_decoder = (_blocks(config, stack) for stack in block.stacks(config))
    if config.task == "finetune":
        return [_embedding(config), *in_encoder, _classifier_head(config)]
    return [_embedding(config), *in_encoder, _projection(config), *in_decoder[0], _pixel_head(config)]


def rank_parameters(config: Experiment) -> int:
    """Return the number of parameters on one rank; tensor parallelism splits those of the blocks."""
    tensor = config.parallelism.tensor
    elsewhere = (
        shape.depth * (block.parameters(shape.width) - block.parameters(shape.width, tensor))
        for _, shape, _, _ in block.stacks(config)
    )
    return count_parameters(config) - sum(elsewhere)


def scoring_bytes(config: Experiment) -> int:
    """Return the bytes in memory while tokens are scored.

    These are the uint8 tubelets of all clips, and floating-point values for a few clips at a time
    (models/selection/rero.py): all pixels and, for every slot but the first, the change from the previous
    slot and its features. Added to them are the embedding with the normalisation folded into it, and the
    linear maps to the features: the embedding again, scaled to pixels, or the sketch on both scales.
    """
    tokens, geometry = config.tokens, config.candidate_geometry
    num_tokens, values = geometry.num_tokens, geometry.tubelet_values
    cut_up = _clips(config) * num_tokens * values
    if not tokens.scores:
        return cut_up
    width, weight_bytes = config.model.shape.encoder.width, VALUE_BYTES[config.precision]
    kind = tokens.score_kind
    features = kind.features(width, values)
    at_once = max(1, min(_clips(config), GPU_CHUNK_TOKENS // num_tokens))
    changed = num_tokens - geometry.tokens_per_slot
    numbers = at_once * (num_tokens * values + changed * (values + features))
    number_bytes = weight_bytes if kind.num_maps else FLOAT32_BYTES  # the normalised pixels are float32
    return cut_up + numbers * number_bytes + (width + kind.num_maps * features) * values * weight_bytes


def held_bytes(config: Experiment) -> int:
    """Return the bytes that the forward pass holds until it returns.

    These are the uint8 tubelets of the micro-batch, and the embedding's weight with the normalisation folded
    into it.
    """
    geometry, value = config.model.geometry, VALUE_BYTES[config.precision]
    weight = config.model.shape.encoder.width * geometry.tubelet_values * value
    tubelets = _clips(config) * geometry.num_tokens * geometry.tubelet_values
    return tubelets + weight


def gathered_bytes(config: Experiment) -> int:
    """Return the bytes of the visible uint8 tubelets, which live as long as the encoder's forward pass."""
    return _clips(config) * config.token_counts.num_visible * config.model.geometry.tubelet_values


def target_bytes(config: Experiment) -> int:
    """Return the bytes in memory while targets are computed, on top of what all layers keep.

    These are all tubelets and the predicted ones in uint8, and the predicted ones' values in float32, before
    and after their means are subtracted (models/tubelets.py). Half-precision predictions are in memory, too,
    but not yet the float32 copy of them that the head is counted to keep.
    """
    in_float32 = 2 if config.loss.normalize_targets else 1
    each = 1 + in_float32 * FLOAT32_BYTES + VALUE_BYTES[config.precision] - FLOAT32_BYTES
    return held_bytes(config) + _predicted_values(config) * each


def loss_bytes(config: Experiment) -> int:
    """Return the bytes in memory while squared errors are summed, on top of what all layers keep.

    PyTorch's kernel holds two tensors of errors; half-precision predictions are still in memory, too.
    """
    value = VALUE_BYTES[config.precision]
    waiting = 0 if value == FLOAT32_BYTES else _predicted_values(config) * value
    return held_bytes(config) + 2 * _predicted_values(config) * FLOAT32_BYTES + waiting


def _predicted_values(config: Experiment) -> int:
    """Return the number of predicted pixel values, B·M·P; 0 in fine-tuning."""
    return _clips(config) * config.token_counts.num_predicted * config.model.geometry.tubelet_values


def _blocks(config: Experiment, stack: block.Stack) -> Iterator[Layer]:
    """Yield the layers of a stack; blocks that recompute the same part share one `BlockMemory`."""
    num_parameters = block.parameters(stack.shape.width, config.parallelism.tensor)
    kinds: dict[block.Recomputed, BlockMemory] = {}
    for index in range(stack.shape.depth):
        recomputed = block.recomputed_of(config.recompute, index)
        if recomputed not in kinds:
            kinds[recomputed] = block_memory(config, stack, recomputed)
        memory = kinds[recomputed]
        yield Layer(
            f"{stack.name} block {index + 1}",
            memory.kept_bytes,
            memory.backward_bytes,
            num_parameters,
            memory.forward_bytes,
            memory.host_bytes,
        )


def _embedding(config: Experiment) -> Layer:
    """Return the memory of the embedding, which keeps the visible tubelets as floating-point values.

    The tubelets need no gradient, so the weight is not kept.
    """
    values, width = config.model.geometry.tubelet_values, config.model.shape.encoder.width
    value = VALUE_BYTES[config.precision]
    pixels = _clips(config) * config.token_counts.num_visible * values * value
    weight = width * values
    # The gradients of the folded and of the stored weight are live; in half precision, the former also exists
    # in float32.
    gradients = weight * (2 * value if value == FLOAT32_BYTES else 2 * value + FLOAT32_BYTES)
    incoming = _clips(config) * config.token_counts.num_visible * width * value
    return Layer("embedding", pixels, incoming + gradients, weight + width)


def _projection(config: Experiment) -> Layer:
    """Return the memory of the norm and linear map from encoder to decoder width, and of the mask token."""
    width, narrow = config.model.shape.encoder.width, config.model.shape.decoder.width
    value = VALUE_BYTES[config.precision]
    tokens = _clips(config) * config.token_counts.num_visible
    kept = 2 * tokens * (width * value + FLOAT32_BYTES)  # inputs of norm and map, two statistics of the norm
    working = tokens * (narrow + width) * value + width * narrow * value
    return Layer("projection", kept, working, 2 * width + width * narrow + narrow)


def _pixel_head(config: Experiment) -> Layer:
    """Return the memory of norm and linear map from predicted tokens to pixels, and of the float32 loss."""
    counts, width = config.token_counts, config.model.shape.decoder.width
    values, value = config.model.geometry.tubelet_values, VALUE_BYTES[config.precision]
    decoded, predicted = (_clips(config) * n for n in (counts.num_kept, counts.num_predicted))
    norm = decoded * width * value + predicted * 2 * FLOAT32_BYTES
    compared = 2 * predicted * values * FLOAT32_BYTES  # predictions and targets
    # The gradient of the predictions is in float32, and again in the model's precision if that is half.
    gradient = predicted * values * (FLOAT32_BYTES if value == FLOAT32_BYTES else FLOAT32_BYTES + value)
    kept = norm + predicted * width * value + compared
    return Layer("head", kept, gradient, 2 * width + width * values + values)


def _classifier_head(config: Experiment) -> Layer:
    """Return the memory of mean, norm and linear map of the classifier: a few vectors per clip."""
    width, classes = config.model.shape.encoder.width, config.model.num_classes or 0
    kept = _clips(config) * (2 * width + classes) * FLOAT32_BYTES
    return Layer("head", kept, 0, 2 * width + width * classes + classes)


def _clips(config: Experiment) -> int:
    return config.batch.micro_batch_size
