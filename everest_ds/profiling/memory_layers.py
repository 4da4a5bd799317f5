"""Predicted activation memory of our models, layer by layer, in closed form, no torch.

Symbols as in compute.py: B clips of a micro-batch, N tokens, K kept, V visible, M = K - V predicted, P values
of a tubelet, D encoder width, d decoder width, e bytes of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from everest_ds.config.backbones import MLP_RATIO, TransformerShape
from everest_ds.config.schema import Experiment
from everest_ds.config.tokens import sketch_width
from everest_ds.profiling.compute import count_parameters
from everest_ds.profiling.memory_blocks import (
    FLOAT32_BYTES,
    VALUE_BYTES,
    BlockMemory,
    Recomputed,
    block_memory,
    recomputed_of,
)

_SCORED_TOKENS = 2**15  # at a time on a GPU (models/rero.py); on a CPU an eighth of these


class Layer(NamedTuple):
    """A part of the model, in the order of the forward pass.

    Attributes:
        name: for people, such as `decoder block 4`.
        kept_bytes: what its forward pass leaves to its backward pass.
        backward_bytes: the most that its backward pass adds to that.
        num_parameters: on this rank.
        forward_bytes: what its forward pass works in, if that can be a peak.
        host_bytes: what its forward pass leaves in host memory.
    """

    name: str
    kept_bytes: int
    backward_bytes: int
    num_parameters: int
    forward_bytes: int = 0
    host_bytes: int = 0


def layers(config: Experiment) -> list[Layer]:
    """The layers of the experiment's model, one rank's share of them."""
    counts, shape = config.token_counts, config.model.shape
    in_encoder = _blocks("encoder", config, shape.encoder, counts.num_visible)
    if config.task == "finetune":
        return [_embedding(config), *in_encoder, _classifier_head(config)]
    in_decoder = _blocks("decoder", config, shape.decoder, counts.num_kept)
    return [_embedding(config), *in_encoder, _projection(config), *in_decoder, _pixel_head(config)]


def rank_parameters(config: Experiment) -> int:
    """Parameters of one rank: tensor parallelism splits the blocks."""
    shape, tensor = config.model.shape, config.parallelism.tensor
    stacks = [shape.encoder] if config.task == "finetune" else [shape.encoder, shape.decoder]
    elsewhere = (
        stack.depth * (_block_parameters(stack, 1) - _block_parameters(stack, tensor)) for stack in stacks
    )
    return count_parameters(config) - sum(elsewhere)


def scoring_bytes(config: Experiment) -> int:
    """While tokens are scored: a clip's tubelets, and a few clips' at a time in numbers (models/rero.py).

    Those are all pixels, and of every slot but the first the change from the one before and its features.
    Beside them lie the embedding with the normalisation folded into it, and the maps to the features: the
    embedding again, on the scale of a pixel, or the sketch on either scale.
    """
    tokens, geometry = config.tokens, config.candidate_geometry
    num_tokens, values = geometry.num_tokens, geometry.tubelet_values
    cut_up = _clips(config) * num_tokens * values
    if tokens.selection != "rero" and tokens.frame_oversampling == 1:
        return cut_up
    width, weight_bytes = config.model.shape.encoder.width, VALUE_BYTES[config.precision]
    sketch = sketch_width(width)
    features, mapped = {"embedding": (width, width), "sketch": (sketch, 2 * sketch), "pixel": (values, 0)}[
        tokens.score
    ]
    at_once = max(1, min(_clips(config), _SCORED_TOKENS // num_tokens))
    changed = num_tokens - geometry.tokens_per_slot
    numbers = at_once * (num_tokens * values + changed * (values + features))
    number_bytes = FLOAT32_BYTES if tokens.score == "pixel" else weight_bytes
    return cut_up + numbers * number_bytes + (width + mapped) * values * weight_bytes


def held_bytes(config: Experiment) -> int:
    """What the forward pass holds on to until it returns: a clip's tubelets, in uint8, and the embedding.

    That is the embedding with the normalisation folded into it.
    """
    geometry, value = config.model.geometry, VALUE_BYTES[config.precision]
    weight = config.model.shape.encoder.width * geometry.tubelet_values * value
    tubelets = _clips(config) * geometry.num_tokens * geometry.tubelet_values
    return tubelets + weight


def gathered_bytes(config: Experiment) -> int:
    """The visible tubelets in uint8, which the encoder's forward pass is called with and holds on to."""
    return _clips(config) * config.token_counts.num_visible * config.model.geometry.tubelet_values


def target_bytes(config: Experiment) -> int:
    """While targets are made (models/tubelets.py), beside what all layers keep.

    All tubelets and the predicted ones in uint8; the latter's values in float32, and minus their means.
    Predictions in half precision wait for the float32 copy that the head keeps, as it does the targets.
    """
    in_float32 = 2 if config.loss.normalize_targets else 1
    each = 1 + in_float32 * FLOAT32_BYTES + VALUE_BYTES[config.precision] - FLOAT32_BYTES
    return held_bytes(config) + _predicted_values(config) * each


def loss_bytes(config: Experiment) -> int:
    """While squared errors are added up, beside what all layers keep.

    PyTorch's kernel holds two tensors of them; predictions in half precision are still there, too.
    """
    value = VALUE_BYTES[config.precision]
    waiting = 0 if value == FLOAT32_BYTES else _predicted_values(config) * value
    return held_bytes(config) + 2 * loss_storage_bytes(config) + waiting


def loss_storage_bytes(config: Experiment) -> int:
    """What the loss, one number, holds on to in pre-training as long as it lives.

    PyTorch's `mse_loss` makes its result as large as the errors and then says that it has one value.
    """
    return _predicted_values(config) * FLOAT32_BYTES


def _predicted_values(config: Experiment) -> int:
    """B·M·P; 0 in fine-tuning."""
    return _clips(config) * config.token_counts.num_predicted * config.model.geometry.tubelet_values


def _blocks(name: str, config: Experiment, shape: TransformerShape, num_tokens: int) -> Iterator[Layer]:
    """Blocks of which the same is recomputed share one `BlockMemory`."""
    tensor, drops = config.parallelism.tensor, name == "encoder" and config.model.drop_path > 0
    num_parameters = _block_parameters(shape, tensor)
    kinds: dict[Recomputed, BlockMemory] = {}
    for index in range(shape.depth):
        recomputed = recomputed_of(config.recompute, index)
        if recomputed not in kinds:
            kinds[recomputed] = block_memory(config, shape, num_tokens, recomputed, drops)
        block = kinds[recomputed]
        yield Layer(
            f"{name} block {index + 1}",
            block.kept_bytes,
            block.backward_bytes,
            num_parameters,
            block.forward_bytes,
            block.host_bytes,
        )


def _embedding(config: Experiment) -> Layer:
    """Keeps the visible tubelets as numbers; they need no gradient, so the weight is not kept."""
    values, width = config.model.geometry.tubelet_values, config.model.shape.encoder.width
    value = VALUE_BYTES[config.precision]
    pixels = _clips(config) * config.token_counts.num_visible * values * value
    weight = width * values
    # the folded weight's gradient, and the weight's own; in half precision the first in float32 as well
    gradients = weight * (2 * value if value == FLOAT32_BYTES else 2 * value + FLOAT32_BYTES)
    incoming = _clips(config) * config.token_counts.num_visible * width * value
    return Layer("embedding", pixels, incoming + gradients, weight + width)


def _projection(config: Experiment) -> Layer:
    """Norm and linear map from the encoder's width to the decoder's, and the mask token."""
    width, narrow = config.model.shape.encoder.width, config.model.shape.decoder.width
    value = VALUE_BYTES[config.precision]
    tokens = _clips(config) * config.token_counts.num_visible
    kept = 2 * tokens * (width * value + FLOAT32_BYTES)  # inputs of both, and the norm's two statistics
    working = tokens * (narrow + width) * value + width * narrow * value
    return Layer("projection", kept, working, 2 * width + width * narrow + narrow)


def _pixel_head(config: Experiment) -> Layer:
    """Norm and linear map from predicted tokens to pixels, and their squared error in float32."""
    counts, width = config.token_counts, config.model.shape.decoder.width
    values, value = config.model.geometry.tubelet_values, VALUE_BYTES[config.precision]
    decoded, predicted = (_clips(config) * n for n in (counts.num_kept, counts.num_predicted))
    norm = decoded * width * value + predicted * 2 * FLOAT32_BYTES
    compared = 2 * predicted * values * FLOAT32_BYTES  # predictions and targets
    # the gradient of the predictions, in the model's precision as well if that is half
    gradient = predicted * values * (FLOAT32_BYTES if value == FLOAT32_BYTES else FLOAT32_BYTES + value)
    kept = norm + predicted * width * value + compared
    return Layer("head", kept, gradient, 2 * width + width * values + values)


def _classifier_head(config: Experiment) -> Layer:
    """Mean, norm and linear map: a few vectors a clip, as good as nothing."""
    width, classes = config.model.shape.encoder.width, config.model.num_classes or 0
    kept = _clips(config) * (2 * width + classes) * FLOAT32_BYTES
    return Layer("head", kept, 0, 2 * width + width * classes + classes)


def _block_parameters(shape: TransformerShape, tensor_parallel: int) -> int:
    """One rank's share: the matrices and what follows their outputs are split, norms and sums are not."""
    width, hidden = shape.width, MLP_RATIO * shape.width
    matrices = 4 * width**2 + 2 * width * hidden
    split_biases = 2 * width + hidden  # of q, v and the hidden layer
    whole = 2 * width + 2 * 2 * width  # biases of the two sums over ranks; both norms
    return (matrices + split_biases) // tensor_parallel + whole


def _clips(config: Experiment) -> int:
    return config.batch.micro_batch_size
