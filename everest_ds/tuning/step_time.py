"""Predicted time of a training step on one rank, term by term: pure arithmetic, no torch.

A step is `grad_accum_steps` micro-batches, each a forward and a backward pass, and one update of the weights.
On an asynchronous device (a GPU) launches, the reduction of gradients, the gathering of ZeRO-3's weights and
copies to the host hide behind compute; what is left is exposed. On a CPU all of it stands in one row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import get_args

from everest_ds.config.batch import BatchPlan, plan_ranks
from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import ZeroSettings, zero_settings
from everest_ds.errors import ConfigError
from everest_ds.profiling.compute import FLOPS_PER_MAC, predict_macs
from everest_ds.tuning.compute_time import (
    BlockTime,
    Rates,
    Work,
    block_time,
    embedding_time,
    head_time,
    other_launches,
    projection_time,
    selection_time,
    total,
)
from everest_ds.tuning.machine import Machine
from everest_ds.tuning.states_time import Passes, state_terms, tensor_terms
from everest_ds.tuning.term import Group, Term

GROUPS: tuple[Group, ...] = get_args(Group)
# Videos are stored a little larger than what is cropped from them: 256 pixels high for crops of 224, at 4:3.
_STORED_HEIGHT, _STORED_WIDTH = 256 / 224, 4 / 3 * 256 / 224


@dataclass(frozen=True)
class StepPrediction:
    """One optimiser step.

    Attributes:
        terms: in the order of a step.
        clips: of all ranks.
        useful_flops_per_s_at_peak: of all ranks; None if the device's peak is unknown.
        useful_flops: of all ranks, none repeated.
    """

    terms: tuple[Term, ...]
    clips: int
    useful_flops: float
    peak_flops_per_s: float | None

    @property
    def step_s(self) -> float:
        """Seconds of the step."""
        return sum(term.seconds for term in self.terms)

    @property
    def clips_per_s(self) -> float:
        """Clips a second of all ranks."""
        return self.clips / self.step_s

    @property
    def mfu_pct(self) -> float | None:
        """Model FLOPs utilisation; None for a device whose peak is unknown."""
        if self.peak_flops_per_s is None:
            return None
        return 100 * self.useful_flops / self.step_s / self.peak_flops_per_s

    def split(self) -> dict[Group, float]:
        """Seconds by group of terms, all groups."""
        seconds = dict.fromkeys(GROUPS, 0.0)
        for term in self.terms:
            seconds[term.group] += term.seconds
        return seconds

    def term(self, name: str) -> Term:
        """The term of that name."""
        return next(term for term in self.terms if term.name == name)


def predict_step(
    config: Experiment, num_ranks: int, machine: Machine, zero: ZeroSettings | None = None
) -> StepPrediction:
    """Time of one step of `config` on `num_ranks` ranks of `machine`.

    Args:
        zero: instead of what the config's DeepSpeed file says.

    Raises:
        ConfigError: the ranks do not divide; the machine has no such precision; states are on NVMe.
    """
    _check(config, machine)
    plan = plan_ranks(config, num_ranks)
    rates = Rates(machine, config.precision)
    passes = [*_parts(config, rates)]
    compute = _compute_terms(passes, plan.grad_accum_steps)
    again, in_blocks = _recompute(config, rates)
    compute.append(
        _work_term("recompute", "recompute", "what recompute.mode repeats", again, plan.grad_accum_steps)
    )
    backward = total(*(part.backward for part in passes), again)
    seen = Passes(total(*(part.forward for part in passes)).seconds, backward.seconds)
    terms = [
        *compute,
        _launch_term(passes, again, plan, machine),
        *tensor_terms(config, plan, machine, in_blocks),
        *state_terms(config, plan, num_ranks, machine, seen, zero or zero_settings(config)),
    ]
    terms.append(_data_term(config, plan, machine, sum(term.seconds for term in terms)))
    flops = FLOPS_PER_MAC * predict_macs(config).training_macs * plan.global_batch_size
    peak = machine.peak_flops_per_s.get(config.precision)
    return StepPrediction(tuple(terms), plan.global_batch_size, flops, peak and peak * num_ranks)


@dataclass(frozen=True)
class _Part:
    name: str
    formula: str
    forward: Work
    backward: Work


def _check(config: Experiment, machine: Machine) -> None:
    if config.precision not in machine.products:
        raise ConfigError(
            f"precision: {machine.device} has no rates for it",
            given=config.precision,
            allowed=", ".join(machine.precisions),
        )
    if config.parallelism.offload_to_nvme is not None:
        raise ConfigError("parallelism.offload_to_nvme: disks are not in the cost model", fix="leave it out")


def _parts(config: Experiment, rates: Rates) -> Iterator[_Part]:
    yield _Part(
        "selection", "pixels cut up; (N - L)·P·D for the scores", selection_time(config, rates), Work()
    )
    yield _Part("embedding", "V·P·D, backward for the weights only", *embedding_time(config, rates))
    for name, block, depth in _stacks(config, rates):
        formula = "depth · (12·n·D² + 2·n²·D) / t forward, twice as much backward (attention 2.5 times)"
        yield _Part(name, formula, block.forward.times(depth), block.backward.times(depth))
        if name == "encoder" and config.task == "pretrain":
            yield _Part("projection", "V·D·d", *projection_time(config, rates))
    yield _Part(
        "head", "M·d·P, targets and loss" if config.task == "pretrain" else "mean", *head_time(config, rates)
    )


def _stacks(config: Experiment, rates: Rates) -> Iterator[tuple[str, BlockTime, int]]:
    counts, shape = config.token_counts, config.model.shape
    drops = config.model.drop_path > 0
    yield "encoder", block_time(config, shape.encoder, counts.num_visible, rates, drops), shape.encoder.depth
    if config.task == "pretrain":
        yield "decoder", block_time(config, shape.decoder, counts.num_kept, rates, False), shape.decoder.depth


def _compute_terms(parts: list[_Part], micro_batches: int) -> list[Term]:
    return [
        _work_term(f"{part.name} {way}", "compute", part.formula, work, micro_batches)
        for way in ("forward", "backward")
        for part in parts
        if (work := getattr(part, way)).seconds
    ]


def _work_term(name: str, group: Group, formula: str, work: Work, micro_batches: int) -> Term:
    numbers = {
        "micro-batches": micro_batches,
        "GFLOP": FLOPS_PER_MAC * work.macs / 1e9,
        "TFLOP/s": FLOPS_PER_MAC * work.macs / work.product_s / 1e12 if work.product_s else 0.0,
        "moved MB": work.moved_bytes / 1e6,
    }
    seconds = micro_batches * work.seconds
    return Term(name, group, seconds, seconds, formula, numbers)


def _recompute(config: Experiment, rates: Rates) -> tuple[Work, dict[str, tuple[BlockTime, int, int]]]:
    """What is computed again; and of each stack a block, how many there are and how many recompute."""
    mode, every = config.recompute.mode, config.recompute.every
    stacks = {}
    for name, block, depth in _stacks(config, rates):
        stacks[name] = (block, depth, {"none": 0, "blocks": -(-depth // every)}.get(mode, depth))
    return total(*(block.again(mode).times(acted_on) for block, _, acted_on in stacks.values())), stacks


def _launch_term(parts: list[_Part], again: Work, plan: BatchPlan, machine: Machine) -> Term:
    in_parts = (work for part in parts for work in (part.forward, part.backward))
    work = total(*in_parts, again, *other_launches())
    busy = plan.grad_accum_steps * work.launches * machine.launch_s
    hidden = plan.grad_accum_steps * work.seconds if machine.asynchronous else 0.0
    numbers = {"operators": work.launches, "µs each": 1e6 * machine.launch_s}
    return Term(
        "launches",
        "overhead",
        max(0.0, busy - hidden),
        busy,
        "operators · launch, beside compute on GPUs",
        numbers,
    )


def _data_term(config: Experiment, plan: BatchPlan, machine: Machine, step_s: float) -> Term:
    """A rank's clips, by its workers, which work while it computes if they have cores of their own."""
    clip, data = config.candidate_geometry, config.data
    frames = clip.num_frames * data.frame_stride
    pixels = frames * clip.image_size**2 * _STORED_HEIGHT * _STORED_WIDTH
    videos = plan.micro_batch_size * plan.grad_accum_steps / data.repeats
    each = machine.decode_s + pixels / machine.decode_pixels_per_s
    workers = max(1.0, min(data.num_workers, machine.spare_cores))
    busy = videos * each / workers
    hides = machine.spare_cores > 0 and data.num_workers > 0
    numbers = {"videos": videos, "ms each": 1e3 * each, "workers": workers}
    exposed = max(0.0, busy - step_s) if hides else busy
    return Term("data", "data", exposed, busy, "videos · time of one / workers, beyond the step", numbers)


def explain(prediction: StepPrediction) -> list[Mapping[str, object]]:
    """A row for each term: what, how long, by which formula and which numbers."""
    return [term.row() for term in prediction.terms]
