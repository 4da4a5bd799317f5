"""Comparison of twenty steps of a tiny run on any mesh of ranks with the same steps in plain PyTorch."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from everest_ds.config import Experiment, plan_ranks
from everest_ds.config.backbones import BACKBONES
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.data.clip_batches import ClipBatch
from everest_ds.models import build_model, linear
from everest_ds.models.initial_weights import draw_initial_weights, outline
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.parallel.engine import (
    Engine,
    build_engine,
    full_parameter,
    gradient_norm,
    set_learning_rate,
)
from everest_ds.parallel.mesh import form_mesh
from everest_ds.parallel.world import World
from everest_ds.training.optimization import build_objective, parameter_groups

STEPS = 20
GLOBAL_BATCH = 8
MICRO_BATCHES = 2  # accumulated in one step, per rank
# A bias that starts at zero is still small after 20 steps, so its relative error is large. With two of the
# seeds 0 to 5, another order of summation alone moves such a bias by 1.5e-5, even in one process.
SEED = 2
STAGES = (0, 1, 2, 3)
TASKS = ("pretrain", "finetune")
MAX_GRADIENT_NORM = 0.5
TOLERANCE = 1e-5
TINY = BACKBONES["vit_tiny"]
# The decoder of vit_tiny has two heads; with four, pre-training can also be split over four ranks.
SPLITTABLE = replace(TINY, decoder=replace(TINY.decoder, heads=4))


@dataclass(frozen=True)
class Trajectory:
    """The result of a run: the loss and gradient norm of each step, and the final weights."""

    losses: list[float]
    norms: list[float | None]
    weights: dict[str, NDArray[np.float32]]


def experiment(
    task: str,
    stage: int,
    data_degree: int,
    tensor: int = 1,
    recompute: dict[str, Any] | None = None,
    precision: str = "fp32",
    offload: bool = False,
    ds_config: Path | None = None,
    nvme: Path | None = None,
) -> Experiment:
    """Return a tiny experiment with clipping, two accumulated micro-batches, layer decay and drop path.

    Layer decay and drop path apply to fine-tuning only.
    """
    spread: dict[str, Any] = {"zero_stage": stage, "tensor": tensor, "offload_to_cpu": offload}
    spread |= {"offload_to_nvme": nvme, "ds_config": ds_config}
    model: dict[str, Any] = {"backbone": "vit_tiny", "image_size": 32, "patch_size": 8, "num_frames": 4}
    model["compile"] = False  # tests/parallel/test_compile.py turns it on
    tokens: dict[str, Any] = {"keep_ratio": 0.5, "mask_ratio": 0.75}
    if task == "finetune":
        model |= {"num_classes": 5, "drop_path": 0.2}
    layer_decay = 0.75 if task == "finetune" else 1.0
    return Experiment.model_validate(
        {
            "task": task,
            "model": model,
            "tokens": tokens,
            "optimizer": {"clip_grad_norm": MAX_GRADIENT_NORM, "layer_decay": layer_decay},
            "batch": {
                "micro_batch_size": GLOBAL_BATCH // data_degree // MICRO_BATCHES,
                "grad_accum_steps": MICRO_BATCHES,
            },
            "precision": precision,
            "parallelism": spread,
            "recompute": recompute or {},
            "run": {"seed": SEED},
        }
    )


def for_tiny_models(shipped: Path, folder: Path) -> Path:
    """Write a copy of a DeepSpeed file with every size divided by 1000, and return its path.

    With the shipped sizes, all parameters of a tiny model are below the threshold and stay on every rank.
    """
    tree = json.loads(shipped.read_text())
    zero = tree["zero_optimization"]
    zero |= {key: value // 1000 for key, value in zero.items() if isinstance(value, int) and value > 1000}
    own = folder / shipped.name
    own.write_text(json.dumps(tree))
    return own


def plain_run(task: str, device: torch.device = torch.device("cpu"), micro_batches: int = 1) -> Trajectory:
    """Run the reference: one process with torch's own AdamW and clipping.

    Args:
        task: pretrain or finetune.
        device: the device of the run.
        micro_batches: number of equal parts of a step's batch whose gradients are accumulated.
    """
    config = experiment(task, stage=0, data_degree=1)
    torch.manual_seed(SEED)
    model = build_model(config).train().to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer), betas=config.optimizer.betas, eps=config.optimizer.eps
    )
    objective = build_objective(config)
    losses: list[float] = []
    norms: list[float | None] = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step) * group["lr_scale"]
        micro_losses = []
        for micro in range(micro_batches):
            loss = objective(model, part(global_batch(step), micro_batches, micro).to(device))
            (loss / micro_batches).backward()
            micro_losses.append(loss.detach())
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(torch.stack(micro_losses).mean()))
    weights = {name: p.detach().cpu().numpy() for name, p in model.named_parameters()}
    return Trajectory(losses, norms, weights)


def start(world: World, config: Experiment) -> Engine:
    """Return the engine of a run, built as `train` builds it."""
    model, ds_config = outline(config), resolve_ds_config(config, world.size)
    groups = parameter_groups(model, config.optimizer)
    mesh = form_mesh(world, MeshShape.of(config, world.size))
    return build_engine(model, groups, config, ds_config, mesh, weights=lambda: draw_initial_weights(config))


def engine_run(world: World, config: Experiment) -> Trajectory:
    """Run the steps of `plain_run` under DeepSpeed; losses are means over all ranks."""
    plan = plan_ranks(config, world.size)
    mesh, engine = form_mesh(world, MeshShape.of(config, world.size)), start(world, config)
    objective = build_objective(config)
    losses, norms = [], []
    for step in range(STEPS):
        set_learning_rate(engine, _learning_rate(step))
        micro_losses = []
        for micro in range(plan.grad_accum_steps):
            accumulated = part(global_batch(step), plan.grad_accum_steps, micro)
            mine = part(accumulated, mesh.shape.num_shares, mesh.share).to(world.device)
            loss = objective(engine, mine)
            engine.backward(loss)
            engine.step()
            micro_losses.append(loss.detach())
        losses.append(float(world.mean(torch.stack(micro_losses).mean())))
        norms.append(gradient_norm(engine))
    weights = {name: full_parameter(p).numpy() for name, p in engine.module.named_parameters()}
    engine.destroy()
    return Trajectory(losses, norms, weights)


def engine_runs(world: World, configs: list[Experiment]) -> list[Trajectory]:
    """Run several experiments in one world, because ranks take longer to start than to run."""
    BACKBONES["vit_tiny"] = SPLITTABLE  # each rank is a separate process, so this affects no other test
    return [engine_run(world, config) for config in configs]


def engine_runs_on_onednn(world: World, configs: list[Experiment]) -> list[Trajectory]:
    """Run `engine_runs` with every matrix product by oneDNN, as for large products on non-Intel CPUs."""
    linear._WORTHWHILE_MACS, linear._PREFERS_ONEDNN = 0, True
    return engine_runs(world, configs)


def assert_equal(run: Trajectory, expected: Trajectory, name: str, within: float = TOLERANCE) -> None:
    """Compare each loss and gradient norm, and each weight tensor relative to its own norm."""
    assert run.losses == pytest.approx(expected.losses, rel=within), f"{name}: losses"
    assert run.norms == pytest.approx(expected.norms, rel=within), f"{name}: gradient norms"
    assert run.weights.keys() == expected.weights.keys(), name
    for parameter, weight in expected.weights.items():
        difference = np.linalg.norm(run.weights[parameter] - weight) / np.linalg.norm(weight)
        assert difference <= within, f"{name}: {parameter} differs by {difference:.1e}"


def assert_same_weights(runs: list[Trajectory], name: str) -> None:
    """Check that the weights of all ranks are bit-identical: copies of a weight must not drift apart."""
    for run in runs[1:]:
        for parameter, weight in runs[0].weights.items():
            assert np.array_equal(run.weights[parameter], weight), f"{name}: {parameter}"


def _learning_rate(step: int) -> float:
    return 1e-3 * (1 + step % 5) / 5


def global_batch(step: int) -> ClipBatch:
    """Return the clips of a step, of all ranks."""
    generator = torch.Generator().manual_seed(step)
    clip = torch.randint(0, 256, (GLOBAL_BATCH, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    ids = torch.arange(GLOBAL_BATCH)
    return ClipBatch(clip, ids % 5, ids * 1000003 + step, ids)


def part(batch: ClipBatch, pieces: int, piece: int) -> ClipBatch:
    """Return the `piece`-th of `pieces` equal parts of a batch."""
    return ClipBatch(*(tensor.chunk(pieces)[piece] for tensor in batch))
