"""What a world saves, any other world takes up and saves again: the same bits, and the same next step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from everest_ds.checkpoints.folder import verify
from everest_ds.checkpoints.reader import STATES, CheckpointReader
from everest_ds.config import plan_batch
from everest_ds.models import build_model
from everest_ds.parallel.checkpoint import Keep, load_checkpoint, save_checkpoint
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.parallel.engine import Engine, build_engine, set_learning_rate
from everest_ds.parallel.world import World
from everest_ds.training.objective import build_objective
from everest_ds.training.parameters import parameter_groups
from tests.checkpoints.made import facts
from tests.parallel.test_equality import experiment, global_batch, part
from tests.ranks import run_ranks

SAVED = 2  # steps done when the first world saves
STAGES = {"fp32": (0, 1, 2, 3), "bf16": (1, 2, 3)}


class Trained:
    """The tiny classifier under one ZeRO stage."""

    def __init__(self, world: World, stage: int, precision: str) -> None:
        self.world = world
        self.config = experiment("finetune", stage, world.size, precision=precision)
        self.plan = plan_batch(self.config.batch, world.size)
        torch.manual_seed(0)
        model = build_model(self.config)
        groups = parameter_groups(model, self.config.optimizer)
        ds_config = resolve_ds_config(self.config, self.plan)
        self.engine: Engine = build_engine(model, groups, self.config, ds_config, world)

    def step(self, number: int) -> float:
        """Mean loss of one optimiser step."""
        set_learning_rate(self.engine, 1e-3)
        objective, losses = build_objective(self.config), []
        for micro in range(self.plan.grad_accum_steps):
            batch = part(global_batch(number), self.plan.grad_accum_steps, micro)
            loss = objective(self.engine, part(batch, self.world.size, self.world.rank))
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return float(self.world.mean(torch.stack(losses).mean()))

    def save(self, folder: Path) -> Path:
        known = facts(SAVED).model_dump(exclude={"optimizer_step", "loss_scale"})
        return save_checkpoint(self.engine, folder, known, Keep(1, None), self.world)


def save_every_stage(world: World, folder: Path, precision: str) -> list[float]:
    """Train and save at every stage; the loss of the step after."""
    losses = []
    for stage in STAGES[precision]:
        trained = Trained(world, stage, precision)
        for number in range(SAVED):
            trained.step(number)
        trained.save(folder / f"from-{stage}")
        losses.append(trained.step(SAVED))
        trained.engine.destroy()
    return losses


def take_up(world: World, folder: Path, precision: str, pairs: list[tuple[int, int]]) -> list[float]:
    """For each pair of stages: load what the first saved into the second, save, go on."""
    losses = []
    for before, now in pairs:
        source = folder / f"from-{before}" / f"step-{SAVED:08d}"
        trained = Trained(world, now, precision)
        load_checkpoint(trained.engine, source, verify(source), world)
        trained.save(folder / f"from-{before}-to-{now}-of-{world.size}")
        losses.append(trained.step(SAVED))
        trained.engine.destroy()
    return losses


def contents(folder: Path) -> dict[tuple[str, str], Tensor]:
    path = folder / f"step-{SAVED:08d}"
    with CheckpointReader(path, verify(path)) as reader:
        return {(s, name): reader.whole(s, name) for s in STATES for name in reader.manifest.parameters}


RING = [(0, 1), (1, 2), (2, 3), (3, 0)]


@pytest.mark.parametrize(
    "precision, worlds, pairs",
    [
        ("fp32", (1, 2), RING),
        pytest.param("fp32", (2, 4), None, marks=pytest.mark.slow),
        pytest.param("fp32", (4, 1), None, marks=pytest.mark.slow),
        pytest.param("bf16", (2, 1), None, marks=pytest.mark.slow),
    ],
    ids=["a stage to the next", "2 to 4 ranks", "4 to 1 rank", "bf16"],
)
def test_stages_take_up_what_others_saved(
    tmp_path: Path, precision: str, worlds: tuple[int, int], pairs: list[tuple[int, int]] | None
) -> None:
    stages = STAGES[precision]
    pairs = pairs or [(before, now) for before in stages for now in stages]
    next_loss = dict(zip(stages, run_ranks(save_every_stage, worlds[0], tmp_path, precision)[0], strict=True))
    losses = run_ranks(take_up, worlds[1], tmp_path, precision, pairs)[0]
    for (before, now), loss in zip(pairs, losses, strict=True):
        saved = contents(tmp_path / f"from-{before}")
        again = contents(tmp_path / f"from-{before}-to-{now}-of-{worlds[1]}")
        assert saved.keys() == again.keys()
        assert all(torch.equal(saved[key], again[key]) for key in saved), (before, now)
        tolerance = 1e-5 if precision == "fp32" else 0.01  # bf16 has 8 bits of mantissa
        assert loss == pytest.approx(next_loss[before], rel=tolerance), (before, now)
