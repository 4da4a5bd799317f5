"""Tests of the lean update of ZeRO-1 and 2: few launches, one host wait, bit-identical weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from everest_ds.config import Experiment
from everest_ds.config.backbones import BACKBONES, Backbone, TransformerShape
from everest_ds.parallel import ds_config as ds_config_module
from everest_ds.parallel.engine import (
    full_parameter,
    gradient_norm,
    set_learning_rate,
    step_skipped,
)
from everest_ds.parallel.world import World
from everest_ds.profiling.launches import LaunchCounter, count_launches
from everest_ds.training.optimization import build_objective
from tests.parallel.equality import (
    SPLITTABLE,
    TOLERANCE,
    Trajectory,
    engine_run,
    experiment,
    global_batch,
    part,
    start,
)
from tests.ranks import run_ranks

# As deep as ViT-L, with as many heads and tensors: the host time of an operator does not depend on the width.
NARROW_VIT_L = Backbone(TransformerShape(64, 24, 16), TransformerShape(32, 4, 8))
MAX_UPDATE_LAUNCHES = 60


def slow(*cell: object) -> object:
    return pytest.param(*cell, marks=pytest.mark.slow)


class Counted(NamedTuple):
    """The launches in each phase of one micro-batch, and the host waits in all phases together."""

    num_tensors: int
    forward: int
    backward: int
    update: int
    waits: int


def count_step(world: World, config: Experiment) -> Counted:
    """Count the launches and waits of the third step, which has one micro-batch."""
    BACKBONES["vit_tiny"] = NARROW_VIT_L
    engine, objective = start(world, config), build_objective(config)
    batch = part(global_batch(0), world.size, world.rank)
    losses: list[Tensor] = []
    phases: list[Callable[[], object]] = [
        lambda: losses.append(objective(engine, batch)),
        lambda: engine.backward(losses[-1]),
        lambda: (engine.step(), step_skipped(engine)),
    ]
    counters: list[LaunchCounter] = []
    for _ in range(3):
        set_learning_rate(engine, 1e-3)
        counters = [count_launches(phase) for phase in phases]
    num_tensors = len(list(engine.module.parameters()))
    engine.destroy()
    forward, backward, update = (counter.total for counter in counters)
    return Counted(num_tensors, forward, backward, update, waits=sum(c.waits for c in counters))


def one_micro_batch(config: Experiment) -> Experiment:
    batch = config.batch.model_copy(update={"grad_accum_steps": 1})
    return config.model_copy(update={"batch": batch})


@pytest.mark.parametrize(
    ("stage", "precision", "ranks"), [(1, "fp32", 1), (2, "bf16", 1), (2, "bf16", 2), (3, "bf16", 1)]
)
def test_a_step_of_vit_large_updates_in_few_launches_and_waits_once(
    stage: int, precision: str, ranks: int
) -> None:
    config = one_micro_batch(experiment("pretrain", stage, ranks, precision=precision))
    counted = run_ranks(count_step, ranks, config)[0]
    assert counted.num_tensors == 374
    assert counted.update <= MAX_UPDATE_LAUNCHES
    assert counted.waits == 1


def test_the_backward_pass_on_one_rank_is_that_of_the_model_alone() -> None:
    config = one_micro_batch(experiment("pretrain", 2, 1, precision="bf16"))
    plain = one_micro_batch(experiment("pretrain", 0, 1))
    sharded, alone = (run_ranks(count_step, 1, each)[0] for each in (config, plain))
    assert sharded.backward - alone.backward <= 4  # for scaling the loss and padding two groups


def runs_of_both_paths(
    world: World, configs: list[Experiment], with_sums: bool
) -> list[tuple[Trajectory, Trajectory]]:
    """Run each experiment with the lean update, and with DeepSpeed's buckets and own update."""
    from everest_ds.parallel import lean_update  # imports DeepSpeed, which must not happen during collection

    BACKBONES["vit_tiny"] = SPLITTABLE
    ours = [engine_run(world, config) for config in configs]
    ds_config_module._UNREDUCED.clear()
    for replaced in ("make_lean", "make_norm_lean"):
        setattr(lean_update, replaced, lambda *_: None)
    if with_sums:
        import everest_ds.parallel.engine as engine_module

        engine_module._as_deepspeed_reads_it = lambda ds_config, lean_stage: ds_config
    return list(zip(ours, (engine_run(world, config) for config in configs), strict=True))


def without_clipping(config: Experiment) -> Experiment:
    optimizer = config.optimizer.model_copy(update={"clip_grad_norm": None})
    return config.model_copy(update={"optimizer": optimizer})


def assert_same_bits(ours: Trajectory, theirs: Trajectory, name: str) -> None:
    assert ours.losses == theirs.losses, name
    for parameter, weight in theirs.weights.items():
        assert np.array_equal(ours.weights[parameter], weight), f"{name}: {parameter}"
    assert ours.norms == pytest.approx(theirs.norms, rel=1e-6), name


@pytest.mark.parametrize(("data", "tensor"), [(1, 1), slow(2, 1), slow(1, 2)])
def test_weights_are_those_of_deepspeed_in_every_bit(data: int, tensor: int) -> None:
    cases = [(1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")]
    configs = [
        without_clipping(one_micro_batch(experiment("finetune", stage, data, tensor, precision=precision)))
        for stage, precision in cases
    ]
    runs = run_ranks(runs_of_both_paths, data * tensor, configs, False)[0]
    for case, (ours, theirs) in zip(cases, runs, strict=True):
        assert_same_bits(ours, theirs, f"{case}, {data} data x {tensor} tensor")


@pytest.mark.parametrize("data", [1, slow(2)])
def test_accumulated_float32_sums_are_those_of_deepspeed_in_every_bit(data: int) -> None:
    configs = [without_clipping(experiment("pretrain", 2, data, precision="bf16"))]
    ours, theirs = run_ranks(runs_of_both_paths, data, configs, True)[0][0]
    assert_same_bits(ours, theirs, f"{data} ranks")


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2)])
def test_clipping_follows_deepspeed(data: int, tensor: int) -> None:
    """Clipping agrees with DeepSpeed up to the last bits of the norm.

    DeepSpeed sums float64 norms in float32; the lean update sums float32 norms in float64.
    """
    configs = [experiment("finetune", stage, data, tensor) for stage in (2, 3)]
    for ours, theirs in run_ranks(runs_of_both_paths, data * tensor, configs, False)[0]:
        assert ours.norms == pytest.approx(theirs.norms, rel=1e-6)
        assert ours.losses == pytest.approx(theirs.losses, rel=TOLERANCE)


MICRO_BATCHES = 32


def error_of_the_sum(world: World, stages: list[int]) -> dict[int, float]:
    """Return, for each stage, the worst tensor's error in a sum of 32 bf16 gradients, against float64."""
    return {stage: _error(world, stage) for stage in stages}


def _error(world: World, stage: int) -> float:
    from deepspeed.utils import safe_get_full_grad

    config = experiment("pretrain", stage, world.size, precision="bf16")
    batch = config.batch.model_copy(update={"micro_batch_size": 1, "grad_accum_steps": MICRO_BATCHES})
    config = config.model_copy(update={"batch": batch})
    engine, objective, sums = start(world, config), build_objective(config), dict[str, Tensor]()

    def note(name: str) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + gradient.double()

        return add

    for name, parameter in engine.module.named_parameters():
        parameter.register_hook(note(name))
    for micro_batch in range(MICRO_BATCHES):
        engine.backward(objective(engine, part(global_batch(micro_batch), 8, world.rank)))
        if micro_batch < MICRO_BATCHES - 1:
            engine.step()
    errors = []
    for name, parameter in engine.module.named_parameters():
        expected = sums[name]
        torch.distributed.all_reduce(expected)
        expected = expected / world.size
        found = safe_get_full_grad(parameter).double()
        errors.append(float((found - expected).norm() / expected.norm()))
    engine.destroy()
    return max(errors)


@pytest.mark.parametrize(("ranks", "limit"), [(1, 1e-6), slow(2, 4e-3)])
def test_32_micro_batches_of_bf16_are_summed_in_float32(ranks: int, limit: float) -> None:
    """Sums are in float32; on two ranks, a gradient is rounded to bf16 once to be sent, by at most 2^-8."""
    for stage, error in run_ranks(error_of_the_sum, ranks, [1, 2, 3])[0].items():
        assert error < limit, f"ZeRO-{stage}"


def skip_a_step(world: World, stage: int) -> tuple[bool, float | None, bool, bool]:
    """Run a step with an infinite gradient on the last rank, then a step with finite ones.

    Returns:
        Whether the first step was skipped, its gradient norm, whether it kept the weights, and whether the
        second step changed them.
    """
    config = one_micro_batch(experiment("pretrain", stage, world.size, precision="bf16"))
    engine, objective = start(world, config), build_objective(config)
    set_learning_rate(engine, 1e-3)

    def weights() -> list[Tensor]:
        return [full_parameter(parameter).clone() for parameter in engine.module.parameters()]

    def step(factor: float) -> None:
        engine.backward(factor * objective(engine, part(global_batch(0), world.size, world.rank)))
        engine.step()

    before = weights()
    step(math.inf if world.rank == world.size - 1 else 1.0)
    kept = all(torch.equal(*pair) for pair in zip(before, weights(), strict=True))
    skipped, norm = step_skipped(engine), gradient_norm(engine)
    step(1.0)
    moved = any(not torch.equal(*pair) for pair in zip(before, weights(), strict=True))
    moved = moved and not step_skipped(engine)
    engine.destroy()
    return skipped, norm, kept, moved


@pytest.mark.parametrize(("stage", "ranks"), [(1, 1), (2, 2)])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(stage: int, ranks: int) -> None:
    assert run_ranks(skip_a_step, ranks, stage) == [(True, math.inf, True, True)] * ranks
