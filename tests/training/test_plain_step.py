"""Tests that the plain PyTorch loop computes the same losses as DeepSpeed's engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.config import Experiment
from everest_ds.parallel.world import World
from everest_ds.training.engine_step import EngineStep, MeasuredStep
from everest_ds.training.plain_step import PlainStep
from tests.ranks import run_ranks
from tests.training.runs import experiment


def losses_of(step: MeasuredStep, num_steps: int) -> list[float]:
    found = []
    for _ in range(num_steps * step.micro_batches):
        loss = step.forward(step.load())
        step.backward(loss)
        step.update()
        found.append(float(loss.detach()))
    return found


def losses_of_both(world: World, config: Experiment) -> tuple[list[float], list[float]]:
    with EngineStep(config, world, learning_rate=1e-3) as step:
        ours = losses_of(step, 3)
    return ours, losses_of(PlainStep(config, world.device, learning_rate=1e-3), 3)


@pytest.mark.parametrize(
    ("precision", "micro_batches", "tolerance"), [("fp32", 2, 1e-6), ("bf16", 1, 1e-3), ("bf16", 2, 5e-3)]
)
def test_losses_are_the_engines(
    motion_data: Path, tmp_path: Path, precision: str, micro_batches: int, tolerance: float
) -> None:
    config = experiment(
        motion_data,
        tmp_path,
        "finetune",
        batch={"global_batch_size": 4 * micro_batches},
        optimizer={"layer_decay": 0.7, "clip_grad_norm": 0.5},
        augment={"rand_augment_ops": 1},
        loss={"label_smoothing": 0.1},
    ).model_copy(update={"precision": precision})
    ((engine, plain),) = run_ranks(losses_of_both, 1, config)
    assert plain == pytest.approx(engine, rel=tolerance)
    assert len(set(plain)) == 3  # because the weights change only at the last micro-batch of a step
