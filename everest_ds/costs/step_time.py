"""Predicted time of a training step on one rank, term by term: pure arithmetic, no torch.

A step is `grad_accum_steps` micro-batches, each a forward and a backward pass, and one update of the weights.
On an asynchronous device (a GPU) each of these three phases takes the longer of the host's and the device's
time. The reduction of gradients, the gathering of ZeRO-3's weights and copies to the host hide behind
compute; only the rest adds to the step. On a CPU nothing overlaps, and all times add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, get_args

from everest_ds.config.batch import BatchPlan, plan_ranks
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import ZeroSettings, zero_settings
from everest_ds.costs.block import num_recomputing, stacks
from everest_ds.costs.communication_time import BlockStack, PassTime, state_terms, tensor_terms
from everest_ds.costs.compute import FLOPS_PER_MAC, predict_macs
from everest_ds.costs.compute_time import (
    Rates,
    Work,
    block_time,
    embedding_time,
    head_time,
    projection_time,
    selection_time,
    total,
)
from everest_ds.costs.hardware.machine import Machine
from everest_ds.costs.host_work import HostWork, host_work
from everest_ds.costs.layer_memory import rank_parameters
from everest_ds.costs.term import Term, TermGroup
from everest_ds.errors import ConfigError

GROUPS: tuple[TermGroup, ...] = get_args(TermGroup)
# Stored videos are assumed to be a little larger than their crops: 256 pixels high for crops of 224, at 4:3.
_STORED_HEIGHT, _STORED_WIDTH = 256 / 224, 4 / 3 * 256 / 224


@dataclass(frozen=True)
class StepPrediction:
    """The prediction of one optimiser step.

    Attributes:
        terms: terms in the order of a step.
        clips: clips of all ranks.
        useful_flops: FLOPs of all ranks, without those that recomputation repeats.
        peak_flops_per_s: peak of all ranks; None if the device's is unknown.
    """

    terms: tuple[Term, ...]
    clips: int
    useful_flops: float
    peak_flops_per_s: float | None

    @property
    def step_s(self) -> float:
        """Return the seconds of the step."""
        return sum(term.seconds for term in self.terms)

    @property
    def clips_per_s(self) -> float:
        """Return the clips per second of all ranks."""
        return self.clips / self.step_s

    @property
    def mfu_pct(self) -> float | None:
        """Return the model FLOPs utilisation in per cent, or None for a device whose peak is unknown."""
        if self.peak_flops_per_s is None:
            return None
        return 100 * self.useful_flops / self.step_s / self.peak_flops_per_s

    def split(self) -> dict[TermGroup, float]:
        """Return the seconds of every group of terms."""
        seconds = dict.fromkeys(GROUPS, 0.0)
        for term in self.terms:
            seconds[term.group] += term.seconds
        return seconds

    def term(self, name: str) -> Term:
        """Return the term that is called `name`."""
        return next(term for term in self.terms if term.name == name)


class Part(NamedTuple):
    """A part of the model, with the work of one micro-batch's passes through it."""

    name: str
    formula: str
    forward: Work
    backward: Work


class StepWork(NamedTuple):
    """The work of one micro-batch on one rank.

    Attributes:
        parts: parts of the model, in the order of a forward pass.
        stacks: encoder, and decoder if the task has one.
        again: work that recomputation repeats.
        num_parameters: parameters of this rank's share under tensor parallelism.
    """

    parts: tuple[Part, ...]
    stacks: tuple[BlockStack, ...]
    again: Work
    num_parameters: int

    def device(self) -> tuple[Work, Work]:
        """Return the work of the device in the forward and in the backward pass."""
        return (
            total(*(part.forward for part in self.parts)),
            total(*(part.backward for part in self.parts), self.again),
        )

    def passes(self, host: HostWork, machine: Machine) -> PassTime:
        """Return the times of the passes, which can hide communication: the slower of device and host."""
        forward_s, backward_s = (work.seconds for work in self.device())
        if machine.asynchronous:
            seconds = host.seconds(machine)
            forward_s, backward_s = max(forward_s, seconds.forward), max(backward_s, seconds.backward)
        return PassTime(forward_s, backward_s, self.num_parameters)


def predict_step(
    config: Experiment, num_ranks: int, machine: Machine, zero: ZeroSettings | None = None
) -> StepPrediction:
    """Predict one step of `config` on `num_ranks` ranks of `machine`.

    Args:
        config: the config to predict.
        num_ranks: number of ranks.
        machine: one rank of the cluster.
        zero: settings that replace those of the config's DeepSpeed file.

    Raises:
        ConfigError: the batch cannot be split over the ranks, the machine has no rates for the precision,
            or states are offloaded to NVMe.
    """
    return assemble_step(predict_work(config, machine), config, num_ranks, machine, zero)


def predict_work(config: Experiment, machine: Machine) -> StepWork:
    """Predict one micro-batch's work, independent of ZeRO, data-parallel ranks and accumulation.

    Raises:
        ConfigError: the machine has no rates for the precision, or states are offloaded to NVMe.
    """
    _check(config, machine)
    rates = Rates(machine, config.precision)
    timed, mode = tuple(_stacks(config, rates)), config.recompute.mode
    again = total(*(stack.again(mode) for stack in timed))
    return StepWork(tuple(_parts(config, rates)), timed, again, rank_parameters(config))


def assemble_step(
    work: StepWork, config: Experiment, num_ranks: int, machine: Machine, zero: ZeroSettings | None = None
) -> StepPrediction:
    """Predict the step that consists of micro-batches of `work`."""
    plan, shape = plan_ranks(config, num_ranks), MeshShape.of(config, num_ranks, machine.ranks_per_node)
    count, zero = plan.grad_accum_steps, zero or zero_settings(config)
    host = host_work(config, shape, zero)
    terms = [
        *_compute_terms(work.parts, count),
        _work_term("recompute", "recompute", f"mode {config.recompute.mode}", work.again, count),
        *tensor_terms(config, plan, shape, machine, work.stacks),
        *state_terms(config, plan, shape, machine, zero, work.passes(host, machine)),
    ]
    update_s = sum(term.seconds for term in terms if term.group == "optimizer")
    terms += _host_terms(host, work, update_s, count, machine)
    terms.append(_data_term(config, plan, machine, sum(term.seconds for term in terms)))
    flops = FLOPS_PER_MAC * predict_macs(config).training_macs * plan.global_batch_size
    peak = machine.peak_flops_per_s.get(config.precision)
    return StepPrediction(tuple(terms), plan.global_batch_size, flops, peak and peak * num_ranks)


def _check(config: Experiment, machine: Machine) -> None:
    if config.precision not in machine.products:
        raise ConfigError(
            f"precision: {machine.device} has no rates for {config.precision}",
            given=config.precision,
            allowed=", ".join(machine.precisions),
        )
    if config.parallelism.offload_to_nvme is not None:
        raise ConfigError(
            "parallelism.offload_to_nvme: NVMe offload is not in the cost model",
            fix="set parallelism.offload_to_nvme=null to predict the step without it",
        )


def _parts(config: Experiment, rates: Rates) -> Iterator[Part]:
    yield Part(
        "selection",
        "clips cut into tubelets; (N - L)·P·D for the scores",
        selection_time(config, rates),
        Work(),
    )
    yield Part("embedding", "V·P·D, backward for the weights only", *embedding_time(config, rates))
    for name, block, depth, _ in _stacks(config, rates):
        formula = "depth · (12·n·D² + 2·n²·D) / t forward, twice as much backward (attention 2.5 times)"
        yield Part(name, formula, block.forward.times(depth), block.backward.times(depth))
        if name == "encoder" and config.task == "pretrain":
            yield Part("projection", "V·D·d", *projection_time(config, rates))
    yield Part(
        "head", "M·d·P, targets and loss" if config.task == "pretrain" else "mean", *head_time(config, rates)
    )


def _stacks(config: Experiment, rates: Rates) -> Iterator[BlockStack]:
    for stack in stacks(config):
        depth = stack.shape.depth
        recomputing = num_recomputing(config.recompute, depth)
        yield BlockStack(stack.name, block_time(config, stack, rates), depth, recomputing)


def _compute_terms(parts: Sequence[Part], micro_batches: int) -> list[Term]:
    return [
        _work_term(f"{part.name} {way}", "compute", part.formula, work, micro_batches)
        for way in ("forward", "backward")
        for part in parts
        if (work := getattr(part, way)).seconds
    ]


def _work_term(name: str, group: TermGroup, formula: str, work: Work, micro_batches: int) -> Term:
    numbers = {
        "micro-batches": micro_batches,
        "GFLOP": FLOPS_PER_MAC * work.macs / 1e9,
        "TFLOP/s": FLOPS_PER_MAC * work.macs / work.product_s / 1e12 if work.product_s else 0.0,
        "moved MB": work.moved_bytes / 1e6,
    }
    seconds = micro_batches * work.seconds
    return Term(name, group, seconds, seconds, formula, numbers)


def _host_terms(
    host: HostWork, work: StepWork, update_s: float, micro_batches: int, machine: Machine
) -> Iterator[Term]:
    """Yield the host's time in each phase beyond the device's, or all of it if the two do not overlap."""
    device_s = (*(each.seconds for each in work.device()), update_s)
    times, seconds = (micro_batches, micro_batches, 1), host.seconds(machine)
    for phase, count, launches, busy, hidden in zip(
        seconds._fields, times, host.launches, seconds, device_s, strict=True
    ):
        exposed = max(0.0, busy - hidden) if machine.asynchronous else busy
        numbers = {"times": count, "operators": launches, "tensors": host.tensors, "ms each": 1e3 * busy}
        formula = "operators · launch + tensors · Python; on GPUs, hidden behind the device's work"
        yield Term(f"host {phase}", "overhead", count * exposed, count * busy, formula, numbers)


def _data_term(config: Experiment, plan: BatchPlan, machine: Machine, step_s: float) -> Term:
    """Return the term of decoding a rank's clips, hidden behind compute if workers have their own cores.

    The ranks of a tensor group decode the clips of their group in turn: all at once if they have workers.
    """
    clip, data = config.candidate_geometry, config.data
    frames = clip.num_frames * data.frame_stride
    pixels = frames * clip.image_size**2 * _STORED_HEIGHT * _STORED_WIDTH
    readers = config.parallelism.tensor if data.num_workers else 1
    videos = plan.micro_batch_size * plan.grad_accum_steps / data.repeats / readers
    each = machine.decode_s + pixels / machine.decode_pixels_per_s
    workers = max(1.0, min(data.num_workers, machine.spare_cores))
    busy = videos * each / workers
    hides = machine.spare_cores > 0 and data.num_workers > 0
    numbers = {"videos": videos, "ms each": 1e3 * each, "workers": workers}
    exposed = max(0.0, busy - step_s) if hides else busy
    return Term(
        "data",
        "data",
        exposed,
        busy,
        "videos · time per video / workers, beyond the rest of the step",
        numbers,
    )
