"""Predicted activation memory of one block on one rank, in closed form, without torch.

Sizes are multiples of one tensor of n tokens x D width: A = B·n·D·(bytes per value). costs/block.py lists
what a block keeps for its backward pass: the input of every operator but the sums. Two sizes depend on the
config: the output of GELU, 4A, may be recomputed (models/mlp.py), and unfused attention also keeps S, the
softmax of every pair of tokens, B·h·n² values.
"""

from __future__ import annotations

from dataclasses import dataclass

from everest_ds.config.backbones import logits_per_chunk
from everest_ds.config.precision import FLOAT32_BYTES, VALUE_BYTES
from everest_ds.config.schema import Experiment
from everest_ds.costs import block

_WHOLE = block.kept(block.OPERATORS) - block.OPERATORS[0].kept  # tensors that a block keeps besides its input
_IN_ATTENTION = block.kept(block.repeated("attention"), split=True)  # q, k, v and the output of attention
_NORM_STATISTICS = 2  # mean and deviation of every token, in float32
_CHUNK_TENSORS = 5  # softmax, its gradient, the gradient of the logits, and two intermediate results


@dataclass(frozen=True)
class BlockMemory:
    """The memory of one block of a stack on one rank.

    Attributes:
        recomputed: part of the block that the forward pass drops and the backward pass recomputes.
        input_bytes: the part of the input of the block, or of its recomputed part, that stays on this rank's
            device: 0 if it is offloaded to the host, a share if the tensor-parallel ranks split it.
        host_bytes: the part of that input that is offloaded to host memory.
        drops: whether both branches are multiplied by drop path's scales.
        tensor_bytes: A, one tensor of all tokens and the whole width.
        split_bytes: A divided by the tensor-parallel degree.
        attention_bytes: kept within attention: q, k, v, output, and the softmax or its log-sum-exp values.
        hidden_bytes: the MLP's hidden layer before GELU.
        gelu_bytes: the hidden layer after GELU; 0 if it is recomputed.
        norm_bytes: means and deviations of both norms.
        logits_bytes: S, or 0 for fused attention.
        fused_bytes: working memory of a fused kernel: gradients of q, k and v, and logits of a few heads;
            0 for unfused attention.
        weight_bytes: gradient of one of the MLP's matrices, before it is accumulated.
    """

    recomputed: block.Recomputed
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
        """Bytes that the forward pass keeps on the device for the backward pass."""
        if self.recomputed == "everything":
            return self.input_bytes
        forgotten = {"attention": self.attention_bytes, "mlp": self.hidden_bytes}.get(self.recomputed, 0)
        return self.input_bytes + self._inner_bytes - forgotten

    @property
    def forward_bytes(self) -> int:
        """Peak of temporary bytes in the forward pass, at the end of the MLP, on top of what it keeps.

        While the MLP's output is computed, these are GELU's output (unless it is kept) and that output. While
        the output is added to the residual stream, they are the output, its copy scaled by drop path, and the
        sum. A recomputed part adds the tensors that lead up to it.
        """
        forgotten = {"mlp": self.hidden_bytes, "everything": 2 * self.tensor_bytes + self.hidden_bytes}
        making = self.hidden_bytes - self.gelu_bytes + self.tensor_bytes
        adding = 2 * self.tensor_bytes + self._masked_bytes
        return max(making, adding) + forgotten.get(self.recomputed, 0)

    @property
    def backward_bytes(self) -> int:
        """Peak of bytes in the backward pass on top of what the forward pass keeps."""
        fetched = self.tensor_bytes if self.input_bytes < self.tensor_bytes else 0
        return fetched + max(self._in_mlp, self._in_attention)

    @property
    def _in_mlp(self) -> int:
        """Bytes on top of the kept ones while the gradient of the hidden layer is computed.

        In memory are the gradients of the block's output, of GELU's output and input and of one weight, and
        the recomputed tensors with their output. GELU's output, if it was kept, is already released.
        """
        again = {
            "mlp": self.hidden_bytes + self.tensor_bytes,
            "everything": self._inner_bytes + self.tensor_bytes,
        }
        gradients = self.tensor_bytes + self._masked_bytes + 2 * self.hidden_bytes + self.weight_bytes
        return gradients + again.get(self.recomputed, 0) - self.gelu_bytes

    @property
    def _in_attention(self) -> int:
        """Bytes on top of the kept ones while the gradients of attention are computed.

        In memory are the gradients of the sum between attention and MLP, and of attention's output. Fused
        attention adds the gradients of q, k and v and the kernel's working memory; unfused attention adds the
        gradients of softmax and logits. Recomputation adds the recomputed tensors with their output, and the
        gradient of that output if it differs from the block's. Already released are the MLP and its norm, the
        input of the output projection and, in unfused attention, v.
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
        """Bytes of a branch's gradient if drop path makes it differ from the sum's gradient, otherwise 0."""
        return self.tensor_bytes if self.drops else 0

    @property
    def _inner_bytes(self) -> int:
        """Bytes that a block keeps without recomputation, excluding its input."""
        in_mlp = self.hidden_bytes + self.gelu_bytes
        return _WHOLE * self.tensor_bytes + self.norm_bytes + self.attention_bytes + in_mlp


def block_memory(config: Experiment, stack: block.Stack, recomputed: block.Recomputed) -> BlockMemory:
    """Predict the memory of one block of `stack` on one rank, for a micro-batch."""
    value, clips = VALUE_BYTES[config.precision], config.batch.micro_batch_size
    shape, num_tokens, tensor = stack.shape, stack.num_tokens, config.parallelism.tensor
    heads, tokens = shape.heads // tensor, clips * num_tokens
    full = tokens * shape.width * value
    split = full // tensor
    unfused = config.model.attention == "unfused"
    logits = tokens * num_tokens * heads * value if unfused else 0
    # For several clips, unfused attention copies k and v for the matrix products, keeps the scaled q and
    # releases the original q, k and v. For a single clip, k and v are used without a copy, so all three
    # originals stay in memory next to the scaled q.
    tensors = _IN_ATTENTION + (1 if unfused and clips == 1 else 0)
    part = split if config.recompute.partition else full
    fused = block.ATTEND.inputs * split + _chunk_bytes(config, num_tokens, clips * heads)
    offloaded = config.recompute.offload_to_cpu and recomputed != "nothing"
    return BlockMemory(
        recomputed=recomputed,
        input_bytes=0 if offloaded else part,
        host_bytes=part if offloaded else 0,
        drops=stack.drops,
        tensor_bytes=full,
        split_bytes=split,
        attention_bytes=tensors * split + (logits or tokens * heads * FLOAT32_BYTES),
        hidden_bytes=block.GELU.kept * split,
        gelu_bytes=block.FC2.kept * split if config.recompute.mode == "none" else 0,
        norm_bytes=block.NUM_NORMS * _NORM_STATISTICS * tokens * FLOAT32_BYTES,
        logits_bytes=logits,
        fused_bytes=0 if unfused else fused,
        weight_bytes=block.largest_matrix(shape.width) * value // tensor,
    )


def _chunk_bytes(config: Experiment, num_tokens: int, heads: int) -> int:
    """Return the bytes of logits that are processed at once in bfloat16 on a CPU (models/attention.py).

    GPU kernels hold none of these tensors, so on a GPU the prediction is at most 84 MB too high if the
    peak is in attention.
    """
    if config.precision != "bf16":
        return 0
    heads_at_once, rows = logits_per_chunk(num_tokens)
    return _CHUNK_TENSORS * min(heads, heads_at_once) * rows * num_tokens * VALUE_BYTES["bf16"]
