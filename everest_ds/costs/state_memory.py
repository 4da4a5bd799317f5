"""Predicted memory of a model's states under ZeRO, in closed form, without torch.

The rules describe DeepSpeed 0.19.8 with the files of ds_configs/ and with parallel/lean_update.py. Each rule
is checked against the live tensors of an engine (tests/costs/test_state_memory.py). Symbols: Ψ
parameters, N data-parallel ranks, e bytes per value, s bytes per value in the sum of several micro-batches'
gradients (in bf16 4 by default, otherwise e):

    stage       parameters   masters   gradients     AdamW   buffers
    0           eΨ           4Ψ (a)    eΨ            8Ψ      -
    1, 2; N=1   eΨ           4Ψ        sΨ, eΨ (b)    8Ψ      -
    1           eΨ           4Ψ/N      sΨ (c, d)     8Ψ/N    buckets, within the backward pass (e)
    2           eΨ           4Ψ/N      sΨ/N (c)      8Ψ/N    buckets, within the backward pass
    3           eΨ/N         4Ψ/N      sΨ/N          8Ψ/N    a bucket, always; copies (f), weights (g)

(a) Stage 0 has no separate masters in fp32.
(b) The gradients of one backward pass are held next to a float32 sum, to which they are added at the end.
(c) The sum is held between micro-batches. A single micro-batch writes its gradients directly into the bucket.
(d) Float32 sums take 4Ψ/N more once a bucket is reduced.
(e) Stage 1 also holds the buckets between micro-batches, with s bytes per value.
(f) The copies exist while a full bucket is scattered over the ranks.
(g) At most `stage3_max_live_parameters` weights are gathered. The flat bucket that has just arrived is also
    held while its weights are copied into tensors of their own. If the model has fewer parameters than
    `stage3_max_reuse_distance`, DeepSpeed releases a parameter only after its backward pass: the whole model
    is then gathered, and nothing arrives during the backward pass. DeepSpeed's default is a billion; the
    files of ds_configs/ set both to a few blocks.

Offload moves this rank's share of masters, AdamW states and float32 gradients to the host and, at stage 3,
its weights. At stage 2 the new values of the weights are staged there as well. The rules for offload follow
DeepSpeed's code and have not been checked on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from everest_ds.config.precision import FLOAT32_BYTES, VALUE_BYTES
from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import ALLREDUCE_VALUES, ZeroSettings, zero_settings

MASTER_BYTES = FLOAT32_BYTES
ADAMW_BYTES = 2 * FLOAT32_BYTES  # two moments


@dataclass(frozen=True)
class StateMemory:
    """The model states of one rank under ZeRO.

    Attributes:
        stage: ZeRO stage.
        num_parameters: parameters of this rank's share of the model under tensor parallelism.
        ranks: N, the number of data-parallel ranks.
        value_bytes: e, bytes per value of weights and gradients.
        sum_bytes: s, bytes per value of accumulated gradients.
        accumulates: whether a step has several micro-batches.
        reduces: whether gradients go through buckets; false at stage 0, and on one rank at stages 1 and 2.
        bucket_values: values per reduce bucket.
        num_buckets: number of reduce buckets.
        gathered_values: maximum number of parameters that ZeRO-3 has gathered at once.
        arriving_values: maximum number of these that exist twice while they arrive.
        gathers_twice: whether ZeRO-3 gathers weights for the forward pass and again for the backward pass.
        stepped_values: maximum number of parameters that ZeRO-3's optimiser updates at once.
        offloads_optimizer: whether masters, AdamW states and gradients are in host memory.
        offloads_parameters: whether the shards of the weights are in host memory.
    """

    stage: int
    num_parameters: int
    ranks: int
    value_bytes: int
    sum_bytes: int
    accumulates: bool
    reduces: bool
    bucket_values: int
    num_buckets: int
    gathered_values: int
    arriving_values: int
    gathers_twice: bool
    stepped_values: int
    offloads_optimizer: bool = False
    offloads_parameters: bool = False

    @property
    def parameter_bytes(self) -> int:
        """Bytes of this rank's weights on the device, without gathered ones."""
        return 0 if self.offloads_parameters else self._share(3) * self.value_bytes

    @property
    def master_bytes(self) -> int:
        """Bytes of the float32 copies that the optimiser updates; ZeRO copies even float32 weights."""
        needed = self.stage > 0 or self.value_bytes != MASTER_BYTES
        return self._share(1) * MASTER_BYTES if needed and not self.offloads_optimizer else 0

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's two moments on the device."""
        return 0 if self.offloads_optimizer else self._share(1) * ADAMW_BYTES

    @property
    def host_bytes(self) -> int:
        """Bytes in host memory under offload: masters, AdamW's moments, float32 gradients and weights."""
        if not self.offloads_optimizer:
            return 0
        return self._share(1) * (MASTER_BYTES + ADAMW_BYTES + MASTER_BYTES + self.value_bytes)

    def gradient_bytes(self, finished: int, in_backward: bool = True) -> int:
        """Return the bytes of gradients at a moment of the last micro-batch's backward pass.

        Args:
            finished: number of parameters whose backward pass is over.
            in_backward: whether the backward pass is still running.
        """
        if self.offloads_optimizer:
            return 0
        if self.stage == 3 or (self.stage == 2 and self.reduces):
            return self._share(2) * self.sum_bytes if self.accumulates or self.stage == 3 else 0
        if self.reduces:
            return self._replicated_sum_bytes(finished) if self.accumulates else 0
        own, total = finished * self.value_bytes, self.num_parameters * self.sum_bytes
        if not self.accumulates:
            return own
        return total + (own if self._sums_apart and in_backward else 0)

    @property
    def _sums_apart(self) -> bool:
        """True if gradients are accumulated in a separate float32 sum instead of in place."""
        return self.sum_bytes != self.value_bytes

    def _replicated_sum_bytes(self, finished: int) -> int:
        """Return stage 1's bytes of gradient sums: those not yet reduced, and this rank's float32 share."""
        waiting = (self.num_parameters - finished) * self.sum_bytes
        has_part = self._sums_apart and finished >= min(self.bucket_values, self.num_parameters)
        return waiting + (self._share(1) * self.sum_bytes if has_part else 0)

    def buffer_bytes(self, finished: int, in_backward: bool) -> int:
        """Return the bytes of reduce buckets and of parameters that ZeRO-3 has gathered."""
        if not self.reduces:
            return 0
        buckets = self.num_buckets * self.bucket_values
        if self.stage == 3:
            return (buckets + self._gathered(finished, in_backward)) * self.value_bytes
        held = in_backward or (self.stage == 1 and self.accumulates and finished < self.num_parameters)
        return buckets * (self.sum_bytes if self.stage == 1 else self.value_bytes) if held else 0

    def scatter_bytes(self, finished: int) -> int:
        """Return the bytes of ZeRO-3's copy of a bucket, sorted by rank, and of this rank's float32 share."""
        if self.stage < 3:
            return 0
        values = min(finished, self.bucket_values)
        return values * self.value_bytes + (values // self.ranks * self.sum_bytes if self._sums_apart else 0)

    @property
    def reduction_bytes(self) -> int:
        """Temporary bytes of the gradient reduction that follows the backward pass.

        Stage 0 reduces a flat copy of all gradients; the other stages average this rank's share.
        """
        if self.stage == 0:
            return min(self.num_parameters, ALLREDUCE_VALUES) * self.value_bytes
        if self.offloads_optimizer:
            return 0
        has_share = self.gradient_bytes(self.num_parameters) > 0
        return 0 if has_share else self._share(1) * self.value_bytes

    @property
    def update_bytes(self) -> int:
        """Temporary bytes of the optimiser's step: this rank's averaged gradients and their float32 copy.

        Stage 3 flattens the gradients first. The float32 sums of stages 1 and 2 are flat and need no copy.
        """
        own_masters = self.value_bytes != MASTER_BYTES
        if self.stage == 0:
            return self.num_parameters * MASTER_BYTES if own_masters else 0
        if self.offloads_optimizer:
            return 0
        if self.stage < 3:
            return self.reduction_bytes + (0 if self._sums_apart else self._share(1) * MASTER_BYTES)
        # Flat float32 gradients serve as the masters' gradients and take no memory of their own.
        flat_bytes = self.sum_bytes if self.sum_bytes != MASTER_BYTES else 0
        return self.reduction_bytes + min(self._share(1), self.stepped_values) * (flat_bytes + MASTER_BYTES)

    def _gathered(self, finished: int, in_backward: bool) -> int:
        """Return the number of gathered weight values; weights that are arriving count twice."""
        if self.ranks == 1:
            return 0
        ahead = self.num_parameters - finished
        arrives = self.gathers_twice or not in_backward
        return min(ahead, self.gathered_values) + (min(ahead, self.arriving_values) if arrives else 0)

    def _share(self, from_stage: int) -> int:
        """Return this rank's number of values of a state that ZeRO partitions from stage `from_stage` on."""
        return -(-self.num_parameters // self.ranks) if self.stage >= from_stage else self.num_parameters


def state_memory(
    config: Experiment, num_parameters: int, ranks: int, zero: ZeroSettings | None = None
) -> StateMemory:
    """Return the states of `num_parameters` parameters on one of `ranks` data-parallel ranks.

    Args:
        config: the experiment.
        num_parameters: parameters of this rank's share of the model under tensor parallelism.
        ranks: number of data-parallel ranks.
        zero: ZeRO settings that replace those of the config's DeepSpeed file.
    """
    zero, batch = zero or zero_settings(config), config.batch
    stage = config.parallelism.zero_stage
    gathers_twice = zero.reuse_values < num_parameters
    accumulated = batch.grad_accum_steps or (batch.global_batch_size or 0) // (batch.micro_batch_size * ranks)
    accumulates, value_bytes = accumulated > 1, VALUE_BYTES[config.precision]
    sums_in_float32 = zero.sums_in_float32(config.precision, accumulates)
    return StateMemory(
        stage=stage,
        num_parameters=num_parameters,
        ranks=ranks,
        value_bytes=value_bytes,
        sum_bytes=MASTER_BYTES if sums_in_float32 else value_bytes,
        accumulates=accumulates,
        reduces=stage > 0 and not zero.shards_nothing(stage, ranks),
        bucket_values=zero.reduce_bucket_values,
        # ZeRO-1 and ZeRO-2 with overlapping communication fill one bucket while the other is reduced.
        num_buckets=2 if stage < 3 and zero.overlap_comm else 1,
        gathered_values=zero.live_values if gathers_twice else num_parameters,
        arriving_values=zero.prefetch_values,
        gathers_twice=gathers_twice,
        stepped_values=zero.sub_group_values,
        offloads_optimizer=zero.offloads_optimizer,
        offloads_parameters=zero.offloads_parameters,
    )
