"""Predicted time of a model's parts on one rank: products, attention, and operators that only move memory.

Symbols as in costs/compute.py: B clips per micro-batch, n tokens per clip, P values per tubelet, D the
width of a stack, t tensor-parallel ranks, e bytes per value; A = B·n·D·e, the bytes of one tensor of a block.

A linear map is one product forward and two backward, all three with the same multiply-accumulates and the
same intensity. costs/block.py counts the products within attention, and the passes of every operator of a
block over memory, in tensors of A bytes that are read or written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from everest_ds.config.precision import FLOAT32_BYTES, VALUE_BYTES
from everest_ds.config.schema import Experiment
from everest_ds.config.tokens import ClipGeometry
from everest_ds.costs import block
from everest_ds.costs.compute import FLOPS_PER_MAC, predict_macs
from everest_ds.costs.hardware.machine import Machine, RateCurve, intensity

# The linear maps of both branches of a block.
_PROJECTIONS, _IN_MLP = (
    tuple(operator for operator in block.repeated(branch) if operator.is_linear)
    for branch in ("attention", "mlp")
)
# Passes over whole tensors, over tensors that tensor parallelism splits, and those that drop path adds.
_WHOLE, _SPLIT = block.moves(block.OPERATORS), block.moves(block.OPERATORS, split=True)
_DROP_PATH = block.moves(block.DROP_PATH_OPERATORS)
# Scoring writes each pixel as a number, reads it and its predecessor, and writes and reads their difference.
_SCORING_PASSES = 5


class Work(NamedTuple):
    """The work of a part of a pass on a rank's device.

    Attributes:
        macs: multiply-accumulates of its products and attention.
        product_s: time in products and attention.
        moving_s: time in operators that only move memory.
        moved_bytes: bytes that these operators read or write.
    """

    macs: float = 0.0
    product_s: float = 0.0
    moving_s: float = 0.0
    moved_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        """Return the time that the work takes on the device."""
        return self.product_s + self.moving_s

    def times(self, factor: float) -> Work:
        """Scale every figure by `factor`."""
        return Work(*(factor * value for value in self))


NO_WORK = Work()


def total(*parts: Work) -> Work:
    """Add up the figures of several parts."""
    return Work(*map(sum, zip(*parts, strict=True)))


class Rates:
    """The rates of a machine in one precision."""

    def __init__(self, machine: Machine, precision: str) -> None:
        self.products: RateCurve = machine.products[precision]
        self.attention: RateCurve = machine.attention[precision]
        self.moved: RateCurve = machine.moving[precision]

    def linear(self, rows: float, inputs: float, outputs: float, products: int = 1) -> Work:
        """Return the work of `products` (1 to 3) of the three products of a linear map on `rows` rows."""
        macs = products * rows * inputs * outputs
        rate = self.products.at(intensity(rows, inputs, outputs))
        return Work(macs, FLOPS_PER_MAC * macs / rate)

    def attend(self, macs: float, num_tokens: int) -> Work:
        """Return the work of products within attention over `num_tokens` tokens per clip."""
        return Work(macs, FLOPS_PER_MAC * macs / self.attention.at(num_tokens))

    def moving(self, passes: float, tensor_bytes: float) -> Work:
        """Return the work of operators that read or write `passes` tensors of `tensor_bytes` each."""
        num_bytes = passes * tensor_bytes
        return Work(moving_s=num_bytes / self.moved.at(tensor_bytes), moved_bytes=num_bytes)


@dataclass(frozen=True)
class BlockTime:
    """The work of one block of a stack.

    Attributes:
        attention: forward pass of its attention with both projections.
        mlp: forward pass of its MLP, GELU included.
        gelu: forward pass of the MLP's GELU alone.
        rest: forward pass of norms, sums and drop path.
        backward: backward pass of the whole block.
        tensor_bytes: A, the bytes of one tensor of the block.
    """

    attention: Work
    mlp: Work
    gelu: Work
    rest: Work
    backward: Work
    tensor_bytes: float

    @property
    def forward(self) -> Work:
        """Return the work of the forward pass of the block."""
        return total(self.attention, self.mlp, self.rest)

    def again(self, mode: str) -> Work:
        """Return the work that recomputation repeats for one block in `mode`, besides its GELU."""
        work = {"nothing": NO_WORK, "attention": self.attention, "mlp": self.mlp, "everything": self.forward}
        return work[block.RECOMPUTED[mode]]


def block_time(config: Experiment, stack: block.Stack, rates: Rates) -> BlockTime:
    """Return the work of one block of `stack` on a micro-batch."""
    t, width = config.parallelism.tensor, stack.shape.width
    rows = config.batch.micro_batch_size * stack.num_tokens
    one_tensor = rows * width * VALUE_BYTES[config.precision]
    projections, in_mlp = (
        total(*(rates.linear(rows, *each.widths(width, t)) for each in maps))
        for maps in (_PROJECTIONS, _IN_MLP)
    )
    attending, attending_back = _attending(config, stack, rates)
    gelu = rates.moving(block.GELU.moves.forward / t, one_tensor)
    dropping, dropping_back = _DROP_PATH if stack.drops else (0, 0)
    return BlockTime(
        attention=total(projections, attending),
        mlp=total(in_mlp, gelu),
        gelu=gelu,
        rest=rates.moving(_WHOLE.forward + dropping, one_tensor),
        backward=total(
            projections.times(2),
            in_mlp.times(2),
            attending_back,
            rates.moving(_WHOLE.backward + dropping_back + _SPLIT.backward / t, one_tensor),
        ),
        tensor_bytes=one_tensor,
    )


def _attending(config: Experiment, stack: block.Stack, rates: Rates) -> tuple[Work, Work]:
    """Return the work of softmax attention between the projections, forward and backward."""
    clips, t = config.batch.micro_batch_size, config.parallelism.tensor
    _, shape, num_tokens, _ = stack
    products, products_back = block.ATTENTION_PRODUCTS[config.model.attention]
    if config.model.attention == "fused":
        macs = clips * num_tokens**2 * shape.width / t  # per product
        return rates.attend(products * macs, num_tokens), rates.attend(products_back * macs, num_tokens)
    batch = clips * shape.heads / t
    logits = batch * num_tokens**2 * VALUE_BYTES[config.precision]
    product = rates.linear(num_tokens, shape.width / shape.heads, num_tokens).times(batch)
    passes, passes_back = block.LOGIT_PASSES
    return (
        total(product.times(products), rates.moving(passes, logits)),
        total(product.times(products_back), rates.moving(passes_back, logits)),
    )


def selection_time(config: Experiment, rates: Rates) -> Work:
    """Return the work of cutting clips into tubelets, scoring and gathering them; it has no backward pass.

    uint8 pixels are read and written as tubelets; scoring turns each value into a number and a difference.
    """
    clips, geometry = config.batch.micro_batch_size, config.candidate_geometry
    macs = clips * predict_macs(config).score_macs
    values = clips * geometry.num_tokens * geometry.tubelet_values
    scored = _SCORING_PASSES * VALUE_BYTES[config.precision] if config.tokens.rule.scores else 0
    width, rows = config.model.shape.encoder.width, clips * geometry.num_tokens
    rate = rates.products.at(intensity(rows, geometry.tubelet_values, width))
    return total(Work(macs, FLOPS_PER_MAC * macs / rate), rates.moving(2 + scored, values))


def embedding_time(config: Experiment, rates: Rates) -> tuple[Work, Work]:
    """Return the work of embedding visible tubelets, forward and backward.

    The normalisation is folded into the weights, and pixels need no gradient.
    """
    geometry, width, value = _facts(config)
    rows = config.batch.micro_batch_size * config.token_counts.num_visible
    product = rates.linear(rows, geometry.tubelet_values, width)
    folding = rates.moving(6, width * geometry.tubelet_values * value)
    tokens = rates.moving(2 * geometry.tubelet_values / width + 3, rows * width * value)
    return total(product, folding, tokens), total(product, folding)


def projection_time(config: Experiment, rates: Rates) -> tuple[Work, Work]:
    """Return the work between encoder and decoder: a norm, a linear map, and the decoder's input tokens."""
    _, width, value = _facts(config)
    narrow, clips = config.model.shape.decoder.width, config.batch.micro_batch_size
    seen, decoded = clips * config.token_counts.num_visible, clips * config.token_counts.num_kept
    product = rates.linear(seen, width, narrow)
    moving = total(rates.moving(2, seen * width * value), rates.moving(5, decoded * narrow * value))
    return total(product, moving), total(product.times(2), moving)


def head_time(config: Experiment, rates: Rates) -> tuple[Work, Work]:
    """Return the work of the head, forward and backward.

    In pre-training: pixels of predicted tokens, targets and loss. In fine-tuning: the mean over tokens; the
    logits cost too little to count.
    """
    geometry, width, value = _facts(config)
    clips = config.batch.micro_batch_size
    if config.task == "finetune":
        mean = rates.moving(1, clips * config.token_counts.num_kept * width * value)
        return mean, mean
    rows, narrow = clips * config.token_counts.num_predicted, config.model.shape.decoder.width
    product = rates.linear(rows, narrow, geometry.tubelet_values)
    numbers = rows * geometry.tubelet_values * FLOAT32_BYTES
    targets = rates.moving(10 if config.loss.normalize_targets else 3, numbers)
    loss, norm = rates.moving(4, numbers), rates.moving(3, rows * narrow * value)
    return total(product, targets, loss, norm), total(product.times(2), loss, norm)


def _facts(config: Experiment) -> tuple[ClipGeometry, int, int]:
    return config.model.geometry, config.model.shape.encoder.width, VALUE_BYTES[config.precision]
