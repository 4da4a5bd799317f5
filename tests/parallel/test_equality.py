"""Every ZeRO stage on every number of ranks trains as one plain torch process does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from everest_ds.config import Experiment, plan_batch
from everest_ds.data.clips import ClipBatch
from everest_ds.models import build_model
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.parallel.engine import build_engine, set_learning_rate
from everest_ds.parallel.world import World
from everest_ds.training.objective import build_objective
from everest_ds.training.parameters import parameter_groups
from tests.ranks import run_ranks

STEPS = 20
GLOBAL_BATCH = 8
STAGES = (0, 1, 2, 3)


def experiment(
    task: str, stage: int, num_ranks: int, recompute: str = "none", precision: str = "fp32"
) -> Experiment:
    """A tiny run with clipping, layer decay, drop path and two accumulated micro-batches."""
    model: dict[str, Any] = {"backbone": "vit_tiny", "image_size": 32, "patch_size": 8, "num_frames": 4}
    tokens: dict[str, Any] = {"keep_ratio": 0.5, "mask_ratio": 0.75}
    if task == "finetune":
        model |= {"num_classes": 5, "drop_path": 0.2}
    return Experiment.model_validate(
        {
            "task": task,
            "model": model,
            "tokens": tokens,
            "optimizer": {"clip_grad_norm": 0.5, "layer_decay": 0.75 if task == "finetune" else 1.0},
            "batch": {"micro_batch_size": GLOBAL_BATCH // num_ranks // 2, "grad_accum_steps": 2},
            "precision": precision,
            "parallelism": {"zero_stage": stage},
            "recompute": {"mode": recompute},
        }
    )


def learning_rate(step: int) -> float:
    return 1e-3 * (1 + step % 5) / 5


def global_batch(step: int) -> ClipBatch:
    generator = torch.Generator().manual_seed(step)
    clip = torch.randint(0, 256, (GLOBAL_BATCH, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    ids = torch.arange(GLOBAL_BATCH)
    return ClipBatch(clip, ids % 5, ids * 1000003 + step, ids)


def part(batch: ClipBatch, pieces: int, piece: int) -> ClipBatch:
    return ClipBatch(*(tensor.chunk(pieces)[piece] for tensor in batch))


def plain_losses(task: str) -> list[float]:
    """The reference: one process, one batch a step, torch's own AdamW and clipping."""
    config = experiment(task, stage=0, num_ranks=1)
    torch.manual_seed(0)
    model = build_model(config).train()
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.optimizer), betas=config.optimizer.betas, eps=config.optimizer.eps
    )
    objective = build_objective(config)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step) * group["lr_scale"]
        loss = objective(model, global_batch(step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def engine_losses(world: World, config: Experiment) -> list[float]:
    """Mean losses over all ranks of the same steps under DeepSpeed."""
    plan = plan_batch(config.batch, world.size)
    torch.manual_seed(0)
    model = build_model(config)
    groups = parameter_groups(model, config.optimizer)
    engine = build_engine(model, groups, config, resolve_ds_config(config, plan), world)
    objective = build_objective(config)
    losses = []
    for step in range(STEPS):
        set_learning_rate(engine, learning_rate(step))
        micro_losses = []
        for micro in range(plan.grad_accum_steps):
            accumulated = part(global_batch(step), plan.grad_accum_steps, micro)
            loss = objective(engine, part(accumulated, world.size, world.rank))
            engine.backward(loss)
            engine.step()
            micro_losses.append(loss.detach())
        losses.append(float(world.mean(torch.stack(micro_losses).mean())))
    engine.destroy()
    return losses


def all_stages(world: World, task: str, recompute: str) -> list[list[float]]:
    return [engine_losses(world, experiment(task, stage, world.size, recompute)) for stage in STAGES]


def assert_stages_follow(expected: list[float], by_stage: list[list[float]]) -> None:
    for stage, losses in zip(STAGES, by_stage, strict=True):
        assert losses == pytest.approx(expected, rel=1e-5), f"ZeRO stage {stage}"


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_stage_follows_the_plain_loop(task: str, num_ranks: int) -> None:
    assert_stages_follow(plain_losses(task), run_ranks(all_stages, num_ranks, task, "none")[0])


def test_recompute_changes_nothing() -> None:
    assert_stages_follow(plain_losses("finetune"), run_ranks(all_stages, 2, "finetune", "blocks")[0])


def sharded_bf16(world: World) -> list[list[float]]:
    return [
        engine_losses(world, experiment("pretrain", stage, world.size, precision="bf16"))
        for stage in (1, 2, 3)
    ]


def test_bf16_stays_near_fp32_in_every_sharded_stage() -> None:
    expected = plain_losses("pretrain")
    for losses in run_ranks(sharded_bf16, 2)[0]:
        assert losses == pytest.approx(expected, rel=0.01)  # bf16 has 8 bits of mantissa
        assert losses != pytest.approx(expected, rel=1e-5)
