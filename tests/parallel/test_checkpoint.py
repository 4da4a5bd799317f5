"""Tests that a checkpoint loads bit-exactly in any other layout of ranks."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from everest_ds.checkpoints.folder import verify_checkpoint
from everest_ds.checkpoints.reader import CheckpointReader
from everest_ds.checkpoints.sealed_manifest import STATES
from everest_ds.config import plan_ranks
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.models import build_model
from everest_ds.parallel.checkpointing import Keep, Saving, load_checkpoint
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.parallel.engine import Engine, build_engine, set_learning_rate
from everest_ds.parallel.mesh import form_mesh
from everest_ds.parallel.world import World
from everest_ds.training.optimization import build_objective, parameter_groups
from tests.checkpoints.made import facts
from tests.parallel.equality import experiment, global_batch, part
from tests.ranks import run_ranks

SAVED = 2  # number of steps before the first world saves


class Layout(NamedTuple):
    """The way in which the ranks share a model: ZeRO stage and tensor degree."""

    stage: int
    tensor: int

    def folder(self, parent: Path) -> Path:
        return parent / f"stage-{self.stage}-tensor-{self.tensor}"


Move = tuple[Layout, Layout]


class Trained:
    """The tiny classifier and its engine in one layout."""

    def __init__(self, world: World, layout: Layout, precision: str) -> None:
        self.mesh = form_mesh(world, MeshShape.over(world.size, layout.tensor))
        self.config = experiment(
            "finetune", layout.stage, self.mesh.degrees.data, layout.tensor, precision=precision
        )
        self.plan = plan_ranks(self.config, world.size)
        torch.manual_seed(0)
        model = build_model(self.config)
        groups = parameter_groups(model, self.config.optimizer)
        ds_config = resolve_ds_config(self.config, world.size)
        self.engine: Engine = build_engine(model, groups, self.config, ds_config, self.mesh)

    def step(self, number: int) -> float:
        """Run one optimiser step and return its mean loss."""
        set_learning_rate(self.engine, 1e-3)
        objective, losses = build_objective(self.config), []
        for micro in range(self.plan.grad_accum_steps):
            batch = part(global_batch(number), self.plan.grad_accum_steps, micro)
            loss = objective(self.engine, part(batch, self.mesh.shape.num_shares, self.mesh.share))
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach())
        return float(self.mesh.world.mean(torch.stack(losses).mean()))

    def save(self, folder: Path) -> Path:
        known = facts(SAVED).model_dump(exclude={"optimizer_step", "loss_scale"})
        return Saving(self.engine, folder, known, Keep(1, None), self.mesh, copies=None).finish()


def train_and_save(world: World, folder: Path, precision: str, layouts: list[Layout]) -> list[float]:
    """Train and save in each layout; return the losses of the steps after saving."""
    losses = []
    for layout in layouts:
        trained = Trained(world, layout, precision)
        for number in range(SAVED):
            trained.step(number)
        trained.save(layout.folder(folder))
        losses.append(trained.step(SAVED))
        trained.engine.destroy()
    return losses


def take_up(world: World, folder: Path, precision: str, moves: list[Move]) -> list[float]:
    """Load the checkpoint of one layout in another and save it again, for each move.

    Returns:
        The losses of the steps after loading.
    """
    losses = []
    for before, now in moves:
        source = before.folder(folder) / f"step-{SAVED:08d}"
        trained = Trained(world, now, precision)
        load_checkpoint(trained.engine, source, verify_checkpoint(source), trained.mesh)
        trained.save(now.folder(before.folder(folder)))
        losses.append(trained.step(SAVED))
        trained.engine.destroy()
    return losses


def contents(folder: Path) -> dict[tuple[str, str], Tensor]:
    path = folder / f"step-{SAVED:08d}"
    with CheckpointReader(path, verify_checkpoint(path)) as reader:
        return {(s, name): reader.whole(s, name) for s in STATES for name in reader.manifest.parameters}


def layouts(stages: tuple[int, ...], tensor_degrees: tuple[int, ...]) -> list[Layout]:
    return [Layout(*cell) for cell in product(stages, tensor_degrees)]


def some_moves(before: list[Layout], now: list[Layout]) -> list[Move]:
    """Return every third pair of layouts, which combines each layout with many others."""
    return [(b, n) for (i, b), (j, n) in product(enumerate(before), enumerate(now)) if (i + j) % 3 == 0]


def slow(*cell: object) -> object:
    return pytest.param(*cell, marks=pytest.mark.slow)


ALL = (0, 1, 2, 3)
FEW = [
    (Layout(0, 1), Layout(1, 2)),
    (Layout(1, 1), Layout(2, 1)),
    (Layout(2, 1), Layout(3, 2)),
    (Layout(3, 1), Layout(0, 1)),
]


@pytest.mark.parametrize(
    "precision, worlds, moves",
    [
        ("fp32", (1, 2), FEW),
        slow("fp32", (2, 4), some_moves(layouts(ALL, (1, 2)), layouts(ALL, (1, 2, 4)))),
        slow("fp32", (4, 2), some_moves(layouts(ALL, (1, 2, 4)), layouts(ALL, (1, 2)))),
        slow("bf16", (2, 1), some_moves(layouts((1, 2, 3), (1, 2)), layouts((1, 2, 3), (1,)))),
    ],
    ids=["1 to 2 ranks", "2 to 4 ranks", "4 to 2 ranks", "bf16"],
)
def test_a_layout_takes_up_what_another_saved(
    tmp_path: Path, precision: str, worlds: tuple[int, int], moves: list[Move]
) -> None:
    saving = sorted({before for before, _ in moves})
    next_losses = run_ranks(train_and_save, worlds[0], tmp_path, precision, saving)[0]
    next_loss = dict(zip(saving, next_losses, strict=True))
    losses = run_ranks(take_up, worlds[1], tmp_path, precision, moves)[0]
    for (before, now), loss in zip(moves, losses, strict=True):
        saved = contents(before.folder(tmp_path))
        again = contents(now.folder(before.folder(tmp_path)))
        assert saved.keys() == again.keys()
        assert all(torch.equal(saved[key], again[key]) for key in saved), (before, now)
        tolerance = 1e-5 if precision == "fp32" else 0.01  # bf16 has 8 bits of mantissa
        assert loss == pytest.approx(next_loss[before], rel=tolerance), (before, now)
