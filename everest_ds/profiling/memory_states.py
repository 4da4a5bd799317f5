"""Predicted memory of a model's states under ZeRO, in closed form, no torch.

The rules are those of DeepSpeed 0.19.8 with the files of ds_configs/ and of parallel/lean_update.py, each
checked against the live tensors of an engine (tests/profiling/test_memory_states.py). Ψ parameters, N
data-parallel ranks, values of e bytes, s bytes in the sum of several micro-batches' gradients (in bf16 4 by
default, else e):

    stage       parameters   masters   gradients     AdamW   buffers
    0           eΨ           4Ψ (a)    eΨ            8Ψ      -
    1, 2; N=1   eΨ           4Ψ        sΨ, eΨ (b)    8Ψ      -
    1           eΨ           4Ψ/N      sΨ (c, d)     8Ψ/N    buckets, within the backward pass (e)
    2           eΨ           4Ψ/N      sΨ/N (c)      8Ψ/N    buckets, within the backward pass
    3           eΨ/N         4Ψ/N      sΨ/N          8Ψ/N    a bucket, always; copies (f), weights (g)

(a) none in fp32. (b) A float32 sum, and beside it the gradients of one backward pass, which are added to it
at the end. (c) Between micro-batches; of a single one the gradients are born into the bucket. (d) And in
float32 4Ψ/N, once a bucket is reduced. (e) Stage 1 holds them between micro-batches, too, with s bytes a
value. (f) While a full bucket is scattered over the ranks. (g) As many gathered weights as
`stage3_max_live_parameters`, and beside them the bucket that has just arrived, flat, while each gets a tensor
of its own. With a model of fewer than `stage3_max_reuse_distance`, DeepSpeed releases a parameter after its
backward pass only: the whole model is there, and nothing arrives then. Its default is a billion; our files
set both to a few blocks.

Offload moves this rank's share of masters, AdamW and gradients (in float32) to the host, and at stage 3 its
weights; at stage 2 the weights' new values wait there, too. Read in DeepSpeed's code, not checked on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import ZeroSettings, zero_settings
from everest_ds.profiling.memory_blocks import VALUE_BYTES

MASTER_BYTES = 4
ADAMW_BYTES = 2 * 4  # two moments in float32
_ALLREDUCE_VALUES = 500_000_000  # at once, at stage 0


@dataclass(frozen=True)
class ModelStates:
    """States of one rank.

    Attributes:
        stage: of ZeRO.
        num_parameters: of this rank's share of the model under tensor parallelism.
        ranks: N.
        value_bytes: e.
        sum_bytes: s.
        accumulates: a step has several micro-batches.
        reduces: gradients go through buckets; not at stage 0, nor on one rank at stages 1 and 2.
        bucket_values: one reduce bucket, in values.
        num_buckets: so many of them are there.
        gathered_values: parameters that ZeRO-3 has whole at once, at most.
        arriving_values: those of them that it has twice meanwhile, at most.
        gathers_twice: it gathers them for the forward pass, and again for the backward pass.
        stepped_values: parameters that ZeRO-3's optimiser steps at once, at most.
        offloads_optimizer: masters, AdamW and gradients are in host memory.
        offloads_parameters: and the shards of weights.
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
        return 0 if self.offloads_parameters else self._share(3) * self.value_bytes

    @property
    def master_bytes(self) -> int:
        """Float32 copies that the optimiser steps; ZeRO makes one of float32 weights as well."""
        needed = self.stage > 0 or self.value_bytes != MASTER_BYTES
        return self._share(1) * MASTER_BYTES if needed and not self.offloads_optimizer else 0

    @property
    def optimizer_bytes(self) -> int:
        return 0 if self.offloads_optimizer else self._share(1) * ADAMW_BYTES

    @property
    def host_bytes(self) -> int:
        """In host memory: masters, AdamW's moments, gradients in float32, and weights."""
        if not self.offloads_optimizer:
            return 0
        return self._share(1) * (MASTER_BYTES + ADAMW_BYTES + MASTER_BYTES + self.value_bytes)

    def gradient_bytes(self, finished: int, in_backward: bool = True) -> int:
        """At the last micro-batch's moment when the backward pass is through with `finished` parameters."""
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
        """Gradients are added to a float32 sum, not by the backward pass to those of the last one."""
        return self.sum_bytes != self.value_bytes

    def _replicated_sum_bytes(self, finished: int) -> int:
        """Stage 1: sums whose turn is still to come, and in float32 this rank's part of those reduced."""
        waiting = (self.num_parameters - finished) * self.sum_bytes
        has_part = self._sums_apart and finished >= min(self.bucket_values, self.num_parameters)
        return waiting + (self._share(1) * self.sum_bytes if has_part else 0)

    def buffer_bytes(self, finished: int, in_backward: bool) -> int:
        """Buckets in which gradients are reduced, and parameters that ZeRO-3 has gathered."""
        if not self.reduces:
            return 0
        buckets = self.num_buckets * self.bucket_values
        if self.stage == 3:
            return (buckets + self._gathered(finished, in_backward)) * self.value_bytes
        held = in_backward or (self.stage == 1 and self.accumulates and finished < self.num_parameters)
        return buckets * (self.sum_bytes if self.stage == 1 else self.value_bytes) if held else 0

    def scatter_bytes(self, finished: int) -> int:
        """ZeRO-3's copy of a bucket, in the order of the ranks that get it, and its own part in float32."""
        if self.stage < 3:
            return 0
        values = min(finished, self.bucket_values)
        return values * self.value_bytes + (values // self.ranks * self.sum_bytes if self._sums_apart else 0)

    @property
    def reduction_bytes(self) -> int:
        """When the backward pass is over: stage 0 reduces a flat copy of all, others average their share."""
        if self.stage == 0:
            return min(self.num_parameters, _ALLREDUCE_VALUES) * self.value_bytes
        if self.offloads_optimizer:
            return 0
        has_share = self.gradient_bytes(self.num_parameters) > 0
        return 0 if has_share else self._share(1) * self.value_bytes

    @property
    def update_bytes(self) -> int:
        """For the optimiser's step: this rank's averaged gradients, and those in float32.

        Stage 3 makes them flat first. A float32 sum of stages 1 and 2 is flat, and stepped as it is.
        """
        own_masters = self.value_bytes != MASTER_BYTES
        if self.stage == 0:
            return self.num_parameters * MASTER_BYTES if own_masters else 0
        if self.offloads_optimizer:
            return 0
        if self.stage < 3:
            return self.reduction_bytes + (0 if self._sums_apart else self._share(1) * MASTER_BYTES)
        flat_bytes = self.sum_bytes if self.sum_bytes != MASTER_BYTES else 0  # else the masters' gradients
        return self.reduction_bytes + min(self._share(1), self.stepped_values) * (flat_bytes + MASTER_BYTES)

    def _gathered(self, finished: int, in_backward: bool) -> int:
        """Values of the weights that are here whole, those that are arriving counted twice."""
        if self.ranks == 1:
            return 0
        ahead = self.num_parameters - finished
        arrives = self.gathers_twice or not in_backward
        return min(ahead, self.gathered_values) + (min(ahead, self.arriving_values) if arrives else 0)

    def _share(self, from_stage: int) -> int:
        """Parameters of this rank, where what is asked for is split from that stage on."""
        return -(-self.num_parameters // self.ranks) if self.stage >= from_stage else self.num_parameters


def model_states(
    config: Experiment, num_parameters: int, ranks: int, zero: ZeroSettings | None = None
) -> ModelStates:
    """States of `num_parameters` parameters over `ranks`, by `zero` or by the config's DeepSpeed file."""
    zero, batch = zero or zero_settings(config), config.batch
    stage = config.parallelism.zero_stage
    gathers_twice = zero.reuse_values < num_parameters
    accumulated = batch.grad_accum_steps or (batch.global_batch_size or 0) // (batch.micro_batch_size * ranks)
    accumulates, value_bytes = accumulated > 1, VALUE_BYTES[config.precision]
    sums_in_float32 = zero.sums_in_float32(config.precision, accumulates)
    return ModelStates(
        stage=stage,
        num_parameters=num_parameters,
        ranks=ranks,
        value_bytes=value_bytes,
        sum_bytes=MASTER_BYTES if sums_in_float32 else value_bytes,
        accumulates=accumulates,
        reduces=stage > 0 and not zero.shards_nothing(stage, ranks),
        bucket_values=zero.reduce_bucket_values,
        # ZeRO-1 and 2 with overlapping communication fill one bucket while the other is reduced
        num_buckets=2 if stage < 3 and zero.overlap_comm else 1,
        gathered_values=zero.live_values if gathers_twice else num_parameters,
        arriving_values=zero.prefetch_values,
        gathers_twice=gathers_twice,
        stepped_values=zero.sub_group_values,
        offloads_optimizer=zero.offloads_optimizer,
        offloads_parameters=zero.offloads_parameters,
    )
