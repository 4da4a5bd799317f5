"""Predicted activation memory of a stack of blocks, in closed form, no torch.

Bytes come in tensors of n tokens x D width, A = B·n·D·(bytes of a value). What a block of models/vit.py needs
again in its backward pass:

    A    input of the first norm, which is the block's own
    A    its output, input of the qkv projection
    3A   q, k and v
    A    what attention says, input of the output projection
    S    unfused attention: the softmax of every pair of tokens, B·h·n²
    A    input of the second norm
    A    its output, input of the MLP
    4A   the hidden layer before GELU
    4A   the hidden layer after GELU, unless it is computed again (models/mlp.py)

Tensor parallelism splits heads and hidden layer, so everything between the projections, over its ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from everest_ds.config.backbones import MLP_RATIO, TransformerShape
from everest_ds.config.schema import Experiment, RecomputeConfig

FLOAT32_BYTES = 4
VALUE_BYTES = {"fp32": FLOAT32_BYTES, "tf32": FLOAT32_BYTES, "bf16": 2, "fp16": 2}
_CHUNK_LOGITS = 2**20  # of models/attention.py

Recomputed = Literal["nothing", "attention", "mlp", "everything"]


@dataclass(frozen=True)
class BlockMemory:
    """One block of a stack, on one rank.

    Attributes:
        recomputed: what the forward pass forgets.
        input_bytes: of the block's input, or of the recomputed part's, what stays on this rank's device
            meanwhile: nothing if offloaded to the host, a part if the tensor-parallel ranks split it.
        host_bytes: and in host memory.
        drops: both branches are multiplied by drop path's scales.
        tensor_bytes: A, one tensor of all tokens and the whole width.
        split_bytes: A over the tensor-parallel ranks.
        attention_bytes: kept within attention: q, k, v, result, and weights or the logarithms of their sums.
        hidden_bytes: of the MLP's hidden layer.
        gelu_bytes: kept of GELU of it: as much, or 0 where that is computed again.
        norm_bytes: means and deviations of both norms.
        logits_bytes: S, or 0 for fused attention.
        fused_bytes: what a fused kernel works in, or 0: gradients of q, k and v, and logits of a few heads.
        weight_bytes: gradient of one of the MLP's matrices, before it is added to what is there.
    """

    recomputed: Recomputed
    input_bytes: int
    host_bytes: int
    drops: bool
    tensor_bytes: int
    split_bytes: int
    attention_bytes: int
    hidden_bytes: int
    gelu_bytes: int
    norm_bytes: int
    logits_bytes: int
    fused_bytes: int
    weight_bytes: int

    @property
    def kept_bytes(self) -> int:
        """What the forward pass leaves on the device."""
        if self.recomputed == "everything":
            return self.input_bytes
        forgotten = {"attention": self.attention_bytes, "mlp": self.hidden_bytes}.get(self.recomputed, 0)
        return self.input_bytes + self._inner_bytes - forgotten

    @property
    def forward_bytes(self) -> int:
        """The memory that the forward pass works in at the end of the MLP, beside what it leaves.

        While the result is made, that is GELU's output, if it is not kept, and the result. While it is added,
        it is the result, masked or not, and the sum. A recomputed part adds what leads there.
        """
        forgotten = {"mlp": self.hidden_bytes, "everything": 2 * self.tensor_bytes + self.hidden_bytes}
        making = self.hidden_bytes - self.gelu_bytes + self.tensor_bytes
        adding = 2 * self.tensor_bytes + self._masked_bytes
        return max(making, adding) + forgotten.get(self.recomputed, 0)

    @property
    def backward_bytes(self) -> int:
        """The most that the backward pass adds to what the forward pass has left."""
        fetched = self.tensor_bytes if self.input_bytes < self.tensor_bytes else 0
        return fetched + max(self._in_mlp, self._in_attention)

    @property
    def _in_mlp(self) -> int:
        """While the gradient of the hidden layer is made.

        There are the gradients of the block's output, of GELU's output and input and of a weight; and what
        was computed again, with its own result. Done with is GELU's output, if it was kept.
        """
        again = {
            "mlp": self.hidden_bytes + self.tensor_bytes,
            "everything": self._inner_bytes + self.tensor_bytes,
        }
        gradients = self.tensor_bytes + self._masked_bytes + 2 * self.hidden_bytes + self.weight_bytes
        return gradients + again.get(self.recomputed, 0) - self.gelu_bytes

    @property
    def _in_attention(self) -> int:
        """While attention's gradients are made.

        There are those of the block's middle and of attention's result; of q, k and v, beside what a fused
        kernel works in, or unfused of weights and logits; and what was computed again, with its own result
        and that one's gradient, if not the block's own. Done with are the MLP and its norm, the input of the
        output projection and, unfused, v.
        """
        again = {
            "attention": self.attention_bytes + self.tensor_bytes + self._masked_bytes,
            "mlp": self.hidden_bytes,
            "everything": self._inner_bytes + 2 * self.tensor_bytes,
        }
        working = 2 * self.logits_bytes - self.split_bytes if self.logits_bytes else self.fused_bytes
        gradients = self.tensor_bytes + self.split_bytes + working
        done = 2 * self.tensor_bytes + self.hidden_bytes + self.gelu_bytes + self.split_bytes
        return gradients + again.get(self.recomputed, 0) - done

    @property
    def _masked_bytes(self) -> int:
        """The gradient of a branch, where drop path makes it another than that of the sum."""
        return self.tensor_bytes if self.drops else 0

    @property
    def _inner_bytes(self) -> int:
        """All that a block keeps if nothing is recomputed, but for its input."""
        in_mlp = self.hidden_bytes + self.gelu_bytes
        return 3 * self.tensor_bytes + self.norm_bytes + self.attention_bytes + in_mlp


def block_memory(
    config: Experiment, shape: TransformerShape, num_tokens: int, recomputed: Recomputed, drops: bool
) -> BlockMemory:
    """Memory of a block of a stack on `num_tokens` tokens of each clip of a micro-batch, on one rank."""
    value, clips = VALUE_BYTES[config.precision], config.batch.micro_batch_size
    tensor = config.parallelism.tensor
    heads, tokens = shape.heads // tensor, clips * num_tokens
    full = tokens * shape.width * value
    split = full // tensor
    unfused = config.model.attention == "unfused"
    logits = tokens * num_tokens * heads * value if unfused else 0
    # Of several clips unfused attention copies k and v to multiply them and lets q, k and v go, of which it
    # keeps q scaled. A single clip's are multiplied as they are, and all three stay beside the scaled q.
    tensors = 5 if unfused and clips == 1 else 4
    part = split if config.recompute.partition else full
    offloaded = config.recompute.offload_to_cpu and recomputed != "nothing"
    return BlockMemory(
        recomputed=recomputed,
        input_bytes=0 if offloaded else part,
        host_bytes=part if offloaded else 0,
        drops=drops,
        tensor_bytes=full,
        split_bytes=split,
        attention_bytes=tensors * split + (logits or tokens * heads * FLOAT32_BYTES),
        hidden_bytes=MLP_RATIO * split,
        gelu_bytes=MLP_RATIO * split if config.recompute.mode == "none" else 0,
        norm_bytes=2 * 2 * tokens * FLOAT32_BYTES,
        logits_bytes=logits,
        fused_bytes=0 if unfused else 3 * split + _chunk_bytes(config, num_tokens, clips * heads),
        weight_bytes=MLP_RATIO * shape.width**2 * value // tensor,
    )


def _chunk_bytes(config: Experiment, num_tokens: int, heads: int) -> int:
    """Logits of the heads that are worked on at once in bfloat16 on a CPU (models/attention.py).

    Weights, their gradient, that of the logits, and two on the way. Kernels of GPUs hold none of them; there
    this is too much by some megabytes, where it is a peak at all.
    """
    if config.precision != "bf16":
        return 0
    at_once = min(heads, max(2, _CHUNK_LOGITS // num_tokens**2))
    return 5 * at_once * num_tokens**2 * VALUE_BYTES["bf16"]


def recomputed_of(config: RecomputeConfig, index: int) -> Recomputed:
    """What of block `index`: in mode `blocks` the first of every n (parallel/recompute.py)."""
    if config.mode in ("attention", "mlp"):
        return "attention" if config.mode == "attention" else "mlp"
    every = {"none": 0, "gelu": 0, "blocks": config.every, "full": 1}[config.mode]
    return "everything" if every and index % every == 0 else "nothing"
