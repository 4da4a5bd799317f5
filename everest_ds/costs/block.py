"""One transformer block of models/vit.py, described once: all predictions of this package derive from it.

`OPERATORS` lists the operators of a block in the order of its forward pass. A size is a multiple of D, the
width of the block, for one token: the MLP's hidden layer has size MLP_RATIO. One tensor of all tokens and
the width D has A = B·n·D·(bytes per value) bytes. tests/costs/test_block.py checks the table against the real
block, so a change of models/vit.py fails there.

    operator     kept   launches        passes over memory     parameters
                        forward, back   forward, back
    norm         1      1, 1            2, 3                   gain, bias
    qkv bias     -      2, 0            -                      -
    qkv          1      1, 3            0, 3/t                 matrix, biases of q and v
    attention    3/t    1, 2            (costs/compute_time)   -
    proj         1/t    1, 3            0, 1                   matrix, bias
    sum          -      1, 1            3, 3                   -
    norm         1      1, 1            2, 3                   gain, bias
    fc1          1      1, 3            0, 4/t                 matrix, bias
    GELU         4/t    1, 1            8/t, 12/t              -
    fc2          4/t    1, 3            0, 1                   matrix, bias
    sum          -      1, 1            3, 3                   -

t is the tensor-parallel degree: tensor parallelism splits the heads and the hidden layer, and with them all
tensors between the two maps of a branch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, NamedTuple

from everest_ds.config.backbones import MLP_RATIO, TransformerShape
from everest_ds.config.schema import Experiment, RecomputeConfig

BlockPart = Literal["attention", "mlp", "around"]
Recomputed = Literal["nothing", "attention", "mlp", "everything"]


class PerPass(NamedTuple):
    """A count for the forward pass and the same count for the backward pass."""

    forward: int
    backward: int


class Weight(NamedTuple):
    """A parameter tensor of a block.

    Attributes:
        name: name in models/vit.py's Block.
        shape: sizes as multiples of D.
        split: whether tensor parallelism splits it.
    """

    name: str
    shape: tuple[int, ...]
    split: bool = False


@dataclass(frozen=True)
class Operator:
    """One operator of a block; widths are multiples of D.

    Attributes:
        name: human-readable name; for a module of models/vit.py's Block, the name of that module.
        part: the module of the block that contains it, or `around` both modules.
        inputs: width of its input.
        outputs: width of its output.
        kept: width of the tensors that it keeps for the backward pass, which are split as its input is.
        launches: operators that the host launches.
        moves: widths that it reads or writes without a matrix product, which are split as its output is.
        splits_input: whether tensor parallelism splits its input.
        splits_output: whether tensor parallelism splits its output.
        weights: its parameter tensors.
    """

    name: str
    part: BlockPart
    inputs: int
    outputs: int
    kept: int
    launches: PerPass
    moves: PerPass
    splits_input: bool = False
    splits_output: bool = False
    weights: tuple[Weight, ...] = ()

    @property
    def is_linear(self) -> bool:
        """True for a linear map."""
        return any(len(weight.shape) == 2 for weight in self.weights)

    def widths(self, width: int, tensor_parallel: int) -> tuple[float, float]:
        """Return the widths of one rank's share of the input and of the output, in values."""
        inputs, outputs = self.inputs * width, self.outputs * width
        return (
            inputs / tensor_parallel if self.splits_input else inputs,
            outputs / tensor_parallel if self.splits_output else outputs,
        )


def _pointwise(
    name: str, part: BlockPart, width: int, split: bool = False, weights: tuple[Weight, ...] = ()
) -> Operator:
    """Describe an operator that reads its input, keeps it and writes its output.

    Its backward pass reads the input and the gradient of the output, and writes the gradient of the input.
    """
    moves = PerPass(2 * width, 3 * width)
    return Operator(name, part, width, width, width, PerPass(1, 1), moves, split, split, weights)


def _norm(name: str) -> Operator:
    """Describe a LayerNorm with gain and bias."""
    gain, bias = (Weight(f"{name}.{vector}", (1,)) for vector in ("weight", "bias"))
    return _pointwise(name, "around", 1, weights=(gain, bias))


def _sum(name: str) -> Operator:
    """Describe a residual sum; its backward pass adds the gradients of its branch and of the identity."""
    return Operator(name, "around", 1, 1, 0, PerPass(1, 1), PerPass(3, 3))


def _linear(
    part: BlockPart,
    name: str,
    inputs: int,
    outputs: int,
    splits: Literal["input", "output"],
    biases: Mapping[str, int] | None = None,
) -> Operator:
    """Describe a linear map, which keeps its input.

    Its backward pass has a product for the input, a product for the matrix, and a sum of the gradients of the
    output over all tokens, for the bias. Tensor parallelism splits the output of the first map of a branch
    and the input of the second; a bias that is added after the sum over ranks stays whole.
    """
    by_output = splits == "output"
    vectors = biases or {f"{name}.bias": outputs}
    return Operator(
        f"{part}.{name}",
        part,
        inputs,
        outputs,
        kept=inputs,
        launches=PerPass(1, 3),
        moves=PerPass(0, outputs),
        splits_input=not by_output,
        splits_output=by_output,
        weights=(
            Weight(f"{part}.{name}.weight", (outputs, inputs), split=True),
            *(Weight(f"{part}.{vector}", (size,), split=by_output) for vector, size in vectors.items()),
        ),
    )


# The backward pass also stacks the gradients of q, k and v. The rate of attention covers its memory traffic.
ATTEND = Operator("attention.attend", "attention", 3, 1, 3, PerPass(1, 2), PerPass(0, 0), True, True)
GELU = _pointwise("mlp.gelu", "mlp", MLP_RATIO, split=True)
FC2 = _linear("mlp", "fc2", MLP_RATIO, 1, "input")
OPERATORS: tuple[Operator, ...] = (
    _norm("norm1"),
    # k has no bias: zeros are made for it and joined with the biases of q and v.
    Operator("attention.bias", "attention", 0, 0, 0, PerPass(2, 0), PerPass(0, 0)),
    _linear("attention", "qkv", 1, 3, "output", biases={"q_bias": 1, "v_bias": 1}),
    ATTEND,
    _linear("attention", "proj", 1, 1, "input"),
    _sum("sum after attention"),
    _norm("norm2"),
    _linear("mlp", "fc1", 1, MLP_RATIO, "output"),
    GELU,
    FC2,
    _sum("sum after mlp"),
)
# Drop path multiplies both branches by a scale per clip, and their gradients again.
DROP_PATH_OPERATORS = 2 * (Operator("drop path", "around", 1, 1, 0, PerPass(1, 1), PerPass(2, 2)),)
# Matrix products within attention: QKᵀ and AV, and the gradients of their four factors. A fused kernel also
# computes QKᵀ again in the backward pass.
ATTENTION_PRODUCTS = {"fused": PerPass(2, 5), "unfused": PerPass(2, 4)}
# Unfused attention: passes over the logits of all heads (scale, softmax, products).
LOGIT_PASSES = PerPass(5, 6)

WEIGHTS = tuple(weight for operator in OPERATORS for weight in operator.weights)
NUM_NORMS = sum(bool(operator.weights) and not operator.is_linear for operator in OPERATORS)
# The part of a block that a recomputing block repeats, by `recompute.mode`. All modes but `none` repeat GELU.
RECOMPUTED: dict[str, Recomputed] = {
    "none": "nothing",
    "gelu": "nothing",
    "attention": "attention",
    "mlp": "mlp",
    "blocks": "everything",
    "full": "everything",
}


def repeated(recomputed: Recomputed) -> tuple[Operator, ...]:
    """Return the operators whose forward pass runs again if `recomputed` is recomputed."""
    return tuple(operator for operator in OPERATORS if recomputed in ("everything", operator.part))


def launches(operators: Sequence[Operator]) -> PerPass:
    """Add up the operators that the host launches."""
    return PerPass(sum(o.launches.forward for o in operators), sum(o.launches.backward for o in operators))


def moves(operators: Sequence[Operator], split: bool = False) -> PerPass:
    """Add up the passes over memory, over whole or over split tensors."""
    chosen = [operator.moves for operator in operators if operator.splits_output == split]
    return PerPass(sum(each.forward for each in chosen), sum(each.backward for each in chosen))


def kept(operators: Sequence[Operator], split: bool = False) -> int:
    """Add up the whole or the split tensors that are kept for the backward pass."""
    return sum(operator.kept for operator in operators if operator.splits_input == split)


def num_sums(operators: Sequence[Operator]) -> int:
    """Return the number of sums over tensor-parallel ranks per forward pass, one per map of a split input."""
    return sum(operator.is_linear and operator.splits_input for operator in operators)


@lru_cache
def token_macs(width: int) -> int:
    """Return the multiply-accumulates of all linear maps for one token: 12·D² at MLP_RATIO 4."""
    return sum(o.inputs * o.outputs for o in OPERATORS if o.is_linear) * width**2


def pair_macs(width: int) -> int:
    """Return the multiply-accumulates of QKᵀ and AV for one pair of tokens, summed over the heads."""
    return ATTENTION_PRODUCTS["fused"].forward * width


@lru_cache
def parameters(width: int, tensor_parallel: int = 1) -> int:
    """Return the number of a block's parameters on one rank: 12·D² + 12·D without tensor parallelism."""
    split, whole = (
        sum(prod(size * width for size in weight.shape) for weight in WEIGHTS if weight.split == is_split)
        for is_split in (True, False)
    )
    return split // tensor_parallel + whole


def largest_matrix(width: int) -> int:
    """Return the number of values of the largest matrix of a block."""
    return max(prod(weight.shape) for weight in WEIGHTS if len(weight.shape) == 2) * width**2


class Stack(NamedTuple):
    """A stack of equal blocks of a model.

    Attributes:
        name: `encoder` or `decoder`.
        shape: width, depth and heads.
        num_tokens: tokens of each clip that it sees.
        drops: whether drop path scales its branches.
    """

    name: str
    shape: TransformerShape
    num_tokens: int
    drops: bool


def stacks(config: Experiment) -> Iterator[Stack]:
    """Yield the stacks of the experiment's model, in the order of a forward pass."""
    shape, counts = config.model.shape, config.token_counts
    yield Stack("encoder", shape.encoder, counts.num_visible, config.model.drop_path > 0)
    if config.task == "pretrain":
        yield Stack("decoder", shape.decoder, counts.num_kept, drops=False)


def recomputed_of(config: RecomputeConfig, index: int) -> Recomputed:
    """Return the part of block `index` that parallel/recompute.py recomputes.

    Mode `blocks` recomputes the first of every n blocks; the other modes treat all blocks alike.
    """
    return RECOMPUTED[config.mode] if index % _period(config) == 0 else "nothing"


def num_recomputing(config: RecomputeConfig, depth: int) -> int:
    """Return the number of blocks in a stack that recompute more than GELU."""
    return 0 if RECOMPUTED[config.mode] == "nothing" else -(-depth // _period(config))


def _period(config: RecomputeConfig) -> int:
    return config.every if config.mode == "blocks" else 1
