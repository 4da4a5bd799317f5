"""Predicted time of communication, of copies to and from the host, and of the optimiser's step.

DeepSpeed 0.19.8 sends the following for Ψ parameters of e bytes, over N data-parallel ranks, in `a`
micro-batches:

    stage   gradients                                weights
    0       all-reduce eΨ, after the last backward   -
    1       all-reduce eΨ, in the last backward      all-gather eΨ, after the update
    2       a · all-reduce eΨ, in each backward      all-gather eΨ, after the update
    3       a · reduce-scatter eΨ, in each backward  a · 2 all-gathers eΨ, one in each pass

Stages 1 and 2 reduce whole buckets on all ranks (`use_multi_rank_bucket_allreduce`), and each rank keeps its
part.
At stage 3 one all-gather suffices if the whole model may stay gathered (`stage3_max_reuse_distance`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from everest_ds.config.batch import BatchPlan
from everest_ds.config.mesh_shape import MeshShape, RankGroup
from everest_ds.config.precision import FLOAT32_BYTES, VALUE_BYTES
from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import ALLREDUCE_VALUES, ZeroSettings
from everest_ds.costs.block import OPERATORS, RECOMPUTED, num_sums, repeated
from everest_ds.costs.collectives import Collective, collective
from everest_ds.costs.compute_time import NO_WORK, BlockTime, Work, total
from everest_ds.costs.hardware.machine import Machine
from everest_ds.costs.term import Term

_FLOAT64_BYTES = 8
# Sums over the ranks per block: of the outputs of both branches in the forward pass, of the gradients of
# their inputs in the backward pass, and of recomputed outputs.
_SUMS = 2 * num_sums(OPERATORS)
_SUMS_AGAIN = {mode: num_sums(repeated(part)) for mode, part in RECOMPUTED.items()}


class PassTime(NamedTuple):
    """Times of one micro-batch's passes, which can hide communication, and this rank's parameter count."""

    forward_s: float
    backward_s: float
    num_parameters: int


class BlockStack(NamedTuple):
    """A stack of equal blocks; `recomputing` blocks recompute more than GELU."""

    name: str
    block: BlockTime
    depth: int
    recomputing: int

    def again(self, mode: str) -> Work:
        """Return the work that recomputation repeats: GELU of every block, and more of some blocks."""
        if mode == "none":
            return NO_WORK
        return total(self.block.gelu.times(self.depth), self.block.again(mode).times(self.recomputing))


class _States(NamedTuple):
    """The model states of one rank: parameters, its ZeRO part of them, bytes per value, and ZeRO stage."""

    num_parameters: int
    part: int
    value_bytes: int
    stage: int

    @property
    def weight_bytes(self) -> int:
        return self.num_parameters * self.value_bytes


def tensor_terms(
    config: Experiment,
    plan: BatchPlan,
    shape: MeshShape,
    machine: Machine,
    stacks: Sequence[BlockStack],
) -> Iterator[Term]:
    """Yield the terms of tensor parallelism's sums, and of partitioned or offloaded block inputs."""
    mode, group = config.recompute.mode, shape.group("tensor")
    sums, seconds, sent, kept = 0, 0.0, 0.0, 0.0
    for _, block, depth, recomputing in stacks:
        one = collective("all_reduce", block.tensor_bytes, group, machine)
        count = _SUMS * depth + _SUMS_AGAIN[mode] * recomputing
        sums, seconds, sent = sums + count, seconds + count * one.seconds, sent + count * one.sent_bytes
        kept += recomputing * block.tensor_bytes
    if group.ranks > 1:
        total_s = plan.grad_accum_steps * seconds
        numbers = {"sums per micro-batch": sums, "sent MB each": sent / sums / 1e6, "ranks": group.ranks}
        formula = "4 sums of B·n·D per block, plus those that recomputation repeats; never hidden"
        yield Term("tensor-parallel sums", "communication", total_s, total_s, formula, numbers)
    if config.recompute.partition:
        one = collective("all_gather", kept, group, machine)
        total_s = plan.grad_accum_steps * one.seconds
        formula = "all-gather of the partitioned inputs of recomputed blocks"
        yield Term("gather block inputs", "communication", total_s, total_s, formula, {"MB": kept / 1e6})
    if config.recompute.offload_to_cpu:
        share = group.ranks if config.recompute.partition else 1
        yield _copy_term(
            "block inputs to host and back", 2 * kept / share * plan.grad_accum_steps, machine, 0.0
        )


def state_terms(
    config: Experiment,
    plan: BatchPlan,
    shape: MeshShape,
    machine: Machine,
    zero: ZeroSettings,
    passes: PassTime,
) -> Iterator[Term]:
    """Yield the terms of ZeRO's work, in the order of a step."""
    group, stage = shape.group("data"), config.parallelism.zero_stage
    part = -(-passes.num_parameters // group.ranks) if stage else passes.num_parameters
    states = _States(passes.num_parameters, part, VALUE_BYTES[config.precision], stage)
    if group.ranks > 1:
        yield _reduction_term(plan, group, machine, zero, states, passes)
        yield from _gather_terms(plan, group, machine, zero, states, passes)
    if zero.offloads_optimizer:
        yield from _offload_terms(plan, machine, zero, states, passes)
    yield _gradient_term(config, plan, group.ranks, machine, zero, states)
    yield _update_term(config, plan, machine, zero, states)


def _reduction_term(
    plan: BatchPlan, group: RankGroup, machine: Machine, zero: ZeroSettings, states: _States, passes: PassTime
) -> Term:
    bucket = zero.reduce_bucket_values if states.stage else ALLREDUCE_VALUES
    buckets = -(-states.num_parameters // bucket)
    how = "reduce_scatter" if states.stage == 3 else "all_reduce"
    one = collective(how, states.weight_bytes / buckets, group, machine)
    times = plan.grad_accum_steps if states.stage >= 2 else 1
    # Stage 0 reduces after the backward pass, so no compute hides it.
    behind = passes.backward_s if states.stage and zero.overlap_comm else 0.0
    return _hidden_term("reduce gradients", how, one, buckets, times, behind, machine)


def _gather_terms(
    plan: BatchPlan, group: RankGroup, machine: Machine, zero: ZeroSettings, states: _States, passes: PassTime
) -> Iterator[Term]:
    how, times = "all_gather", plan.grad_accum_steps
    if states.stage in (1, 2):
        one = collective(how, states.weight_bytes, group, machine)
        yield _hidden_term("gather updated weights", how, one, 1, 1, 0.0, machine)
    if states.stage < 3:
        return
    messages = -(-states.num_parameters // zero.prefetch_values)
    one = collective(how, states.weight_bytes / messages, group, machine)
    yield _hidden_term("gather weights forward", how, one, messages, times, passes.forward_s, machine)
    if zero.reuse_values < states.num_parameters:
        # The reduction of gradients hides behind the same backward pass first, and takes as long as a gather.
        left = max(0.0, passes.backward_s - messages * one.seconds)
        yield _hidden_term("gather weights backward", how, one, messages, times, left, machine)


def _hidden_term(
    name: str, how: str, one: Collective, messages: int, times: int, behind_s: float, machine: Machine
) -> Term:
    """Return the term of `messages` collectives in each of `times` passes.

    All but one collective per pass can hide behind `behind_s` of compute.
    """
    busy = messages * one.seconds
    exposed = max(one.seconds, busy - behind_s) if machine.asynchronous and behind_s else busy
    numbers = {
        "collectives": messages * times,
        "ms each": 1e3 * one.seconds,
        "sent MB each": one.sent_bytes / 1e6,
    }
    return Term(name, "communication", times * exposed, times * busy, f"{how} by {one.algorithm}", numbers)


def _offload_terms(
    plan: BatchPlan, machine: Machine, zero: ZeroSettings, states: _States, passes: PassTime
) -> Iterator[Term]:
    """Yield the terms of offload's copies: gradients to the host in each backward pass, and weights back."""
    share, times = states.part * states.value_bytes, plan.grad_accum_steps
    yield _copy_term("gradients to host", times * share, machine, times * passes.backward_s)
    if zero.offloads_parameters:
        behind = times * (passes.forward_s + passes.backward_s)
        yield _copy_term("weights from host", 2 * times * share, machine, behind)
    else:
        yield _copy_term("updated weights from host", share, machine, 0.0)


def _copy_term(name: str, num_bytes: float, machine: Machine, behind_s: float) -> Term:
    busy = machine.host_link.seconds(num_bytes)
    exposed = max(0.0, busy - behind_s) if machine.asynchronous else busy
    return Term(name, "offload", exposed, busy, "bytes / rate of the host link", {"MB": num_bytes / 1e6})


def _gradient_term(
    config: Experiment, plan: BatchPlan, degree: int, machine: Machine, zero: ZeroSettings, states: _States
) -> Term:
    """Return the term of gradients: written by each backward pass, added up, and copied through buckets."""
    times, each = plan.grad_accum_steps, states.weight_bytes
    reduces = states.stage > 0 and not zero.shards_nothing(states.stage, degree)
    bucketed = (times if states.stage >= 2 else 1) if reduces or degree > 1 else 0
    summed = 3 * each * (times - 1)
    if zero.sums_in_float32(config.precision, times > 1):
        values = states.part if states.stage >= 2 else states.num_parameters
        summed = values * (states.value_bytes + 2 * FLOAT32_BYTES) * times
    copied = summed + 4 * each * bucketed
    seconds = times * each / machine.fresh_bytes_per_s + copied / machine.copy_bytes_per_s
    numbers = {"new MB": times * each / 1e6, "copied MB": copied / 1e6}
    formula = "eΨ new per pass; 3eΨ (float32: e + 8 per value) per addition, 4eΨ through a bucket"
    return Term("gradients", "optimizer", seconds, seconds, formula, numbers)


def _update_term(
    config: Experiment, plan: BatchPlan, machine: Machine, zero: ZeroSettings, states: _States
) -> Term:
    """Return the term of AdamW on this rank's part, with ZeRO's gradient norm and flat float32 gradients."""
    rate = machine.host_adam_values_per_s if zero.offloads_optimizer else machine.adam_values_per_s
    sums_in_float32 = zero.sums_in_float32(config.precision, plan.grad_accum_steps > 1)
    value = states.value_bytes
    gradient = FLOAT32_BYTES if sums_in_float32 else value
    fresh = copied = read = 0  # bytes per parameter
    if states.stage:
        copied, read = value + FLOAT32_BYTES, gradient  # copied to write weights back, read for the norm
    if states.stage == 3 or (states.stage and zero.offloads_optimizer):
        fresh = gradient + (FLOAT32_BYTES if gradient < FLOAT32_BYTES else 0)
        copied += 2 * gradient
    elif states.stage and not sums_in_float32:
        fresh = FLOAT32_BYTES
        copied += value + FLOAT32_BYTES
    if states.stage and zero.offloads_optimizer:
        read = value + _FLOAT64_BYTES  # the norm is taken tensor by tensor, in float64
    fresh, copied, read = fresh * states.part, copied * states.part, read * states.part
    moved_s = fresh / machine.fresh_bytes_per_s + copied / machine.copy_bytes_per_s
    moved_s += read / machine.moving[config.precision].at(read) if read else 0.0
    numbers = {
        "million values": states.part / 1e6,
        "million per second": rate / 1e6,
        "new MB": fresh / 1e6,
        "copied MB": (copied + read) / 1e6,
    }
    seconds = states.part / rate + moved_s
    return Term("update of weights", "optimizer", seconds, seconds, "Ψ/N / rate, plus copies", numbers)
