"""Tests that the step timed by benchmarks is the step that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.config import Experiment, plan_ranks
from everest_ds.data.clips import training_batches
from everest_ds.data.order import steps_per_epoch
from everest_ds.models.selection.packer import Packer
from everest_ds.parallel.world import World
from everest_ds.training.engine_step import EngineStep, noise_weights
from everest_ds.training.loop import train
from everest_ds.training.optimization import build_schedule
from everest_ds.training.samples import read_training_samples
from everest_ds.training.weights import initial_weights
from tests.ranks import run_ranks
from tests.training.runs import experiment, losses

AUGMENT = {"rand_augment_ops": 2, "erase_probability": 0.5, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}


def losses_of_steps(world: World, config: Experiment, num_steps: int) -> list[float]:
    """Run `EngineStep` on the clips of a run and return the mean loss of each step."""
    plan = plan_ranks(config, world.size)
    samples = read_training_samples(config, config.run.dir / "excluded").samples
    schedule = build_schedule(config.schedule, steps_per_epoch(len(samples), plan), plan.samples_per_step)
    pack = Packer(config) if config.data.pack_tokens else None
    batches = training_batches(
        samples, config, plan, world.rank, range(num_steps), pin_memory=False, on_failure=print, pack=pack
    )
    found = []
    with initial_weights(config, None) as weights, EngineStep(config, world, weights) as step:
        for number in range(num_steps):
            step.learning_rate = schedule.lr(number)
            of_step = []
            for _ in range(step.micro_batches):
                loss = step.forward(next(batches))
                step.backward(loss)
                assert not step.update()
                of_step.append(loss.detach())
            found.append(float(world.mean(torch.stack(of_step).mean())))
    return found


def train_and_step(world: World, config: Experiment) -> list[float]:
    train(config, world)
    return losses_of_steps(world, config, 3)


@pytest.mark.parametrize(
    ("task", "num_ranks", "sections"),
    [
        ("pretrain", 1, {"data": {"pack_tokens": True}, "tokens": {"score": "pixel"}}),
        ("finetune", 1, {"augment": AUGMENT, "loss": {"label_smoothing": 0.1}}),
        pytest.param("finetune", 2, {"optimizer": {"layer_decay": 0.7}}, marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_a_run(
    motion_data: Path, tmp_path: Path, task: str, num_ranks: int, sections: dict[str, Any]
) -> None:
    config = experiment(motion_data, tmp_path, task, **sections)
    found = run_ranks(train_and_step, num_ranks, config)[0]
    expected = losses(tmp_path)
    assert found == [expected[step] for step in (1, 2, 3)]
    assert len(set(found)) == 3


def losses_on_noise(world: World, config: Experiment) -> list[float]:
    found = []
    with EngineStep(config, world) as step:
        for _ in range(2 * step.micro_batches):
            loss = step.forward(step.load())
            step.backward(loss)
            step.update()
            found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("stage", [0, 3])
def test_steps_on_noise_are_all_alike_at_rate_zero(motion_data: Path, tmp_path: Path, stage: int) -> None:
    """A learning rate of 0 keeps the weights, and augmentation does not change the batch of noise."""
    config = experiment(motion_data, tmp_path, "finetune", augment=AUGMENT, parallelism={"zero_stage": stage})
    (found,) = run_ranks(losses_on_noise, 1, config)
    assert len(found) == 4 and len(set(found)) == 1


def test_noise_weights_are_equal_at_every_call_and_complete(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path)
    weights = noise_weights(config, torch.device("cpu"))
    for (name, first), (again, second) in zip(weights(), weights(), strict=True):
        assert name == again and torch.equal(first, second)
