"""Tests of recomputation: it saves the expected memory and changes no result."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.config.backbones import TransformerShape
from everest_ds.config.mesh_shape import MeshShape
from everest_ds.config.schema import RecomputeConfig
from everest_ds.data.clip_batches import ClipBatch
from everest_ds.errors import ConfigError
from everest_ds.models import build_model
from everest_ds.models.vit import Blocks
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.parallel.engine import build_engine, full_parameter, set_learning_rate
from everest_ds.parallel.mesh import form_mesh
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.parallel.world import World
from everest_ds.profiling.allocations import track_allocations
from everest_ds.training.optimization import build_objective, parameter_groups
from tests.parallel.recompute_rows import benchmark
from tests.ranks import run_ranks

NONE = RecomputeConfig()
SAVING = [
    RecomputeConfig(mode="gelu"),
    *(
        RecomputeConfig(mode=mode, offload_to_cpu=offload)
        for mode, offload in itertools.product(("attention", "mlp", "blocks", "full"), (False, True))
    ),
]
TASKS = ("pretrain", "finetune")
BATCH = 4


def name(config: RecomputeConfig) -> str:
    return config.mode + "-offloaded" * config.offload_to_cpu


def experiment(task: str, recompute: RecomputeConfig, stage: int = 0) -> Experiment:
    """Return a tiny experiment with clipping and two accumulated micro-batches; fine-tuning has drop path."""
    model: dict[str, Any] = {"backbone": "vit_tiny", "image_size": 32, "patch_size": 8, "num_frames": 4}
    if task == "finetune":
        model |= {"num_classes": 5, "drop_path": 0.3}
    return Experiment.model_validate(
        {
            "task": task,
            "model": model,
            "tokens": {"keep_ratio": 0.5, "mask_ratio": 0.75},
            "optimizer": {"clip_grad_norm": 0.5},
            "batch": {"micro_batch_size": 1, "grad_accum_steps": 2},
            "precision": "fp32",
            "parallelism": {"zero_stage": stage},
            "recompute": recompute.model_dump(),
        }
    )


def clips(step: int = 0) -> ClipBatch:
    generator = torch.Generator().manual_seed(step)
    clip = torch.randint(0, 256, (BATCH, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
    ids = torch.arange(BATCH)
    return ClipBatch(clip, ids % 5, ids * 1000003 + step, ids)


def fresh_model(config: Experiment) -> nn.Module:
    torch.manual_seed(0)
    return build_model(config)


def gradients(task: str, recompute: RecomputeConfig) -> list[Tensor | None]:
    config = experiment(task, recompute)
    model = fresh_model(config).train()
    apply_recompute(model, recompute)
    build_objective(config)(model, clips()).backward()
    return [parameter.grad for parameter in model.parameters()]


def same(left: list[Any], right: list[Any]) -> bool:
    """Return True if all tensors are present and bit-identical."""
    return all(a is not None and torch.equal(a, b) for a, b in zip(left, right, strict=True))


def configs_with_other_gradients(_: World) -> list[str]:
    found = []
    for task in TASKS:
        expected = gradients(task, NONE)
        found += [f"{task} {name(c)}" for c in SAVING if not same(gradients(task, c), expected)]
    return found


def test_gradients_are_those_without_recompute_bit_for_bit() -> None:
    assert run_ranks(configs_with_other_gradients, 1) == [[]]


def train(world: World, task: str, stage: int, recompute: RecomputeConfig) -> list[Tensor]:
    """Return the weights after two steps of the engine, each followed by an evaluation."""
    config = experiment(task, recompute, stage)
    ds_config = resolve_ds_config(config, world.size)
    if stage == 3:  # shard even these small weights
        ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    model = fresh_model(config)
    mesh = form_mesh(world, MeshShape.of(config, world.size))
    engine = build_engine(model, parameter_groups(model, config.optimizer), config, ds_config, mesh)
    objective = build_objective(config)
    for step in range(2):
        set_learning_rate(engine, 1e-2)
        for micro in range(2):
            mine = slice(2 * micro + world.rank, 2 * micro + world.rank + 1)
            engine.backward(objective(engine, ClipBatch(*(tensor[mine] for tensor in clips(step)))))
            engine.step()
        engine.eval()
        with torch.no_grad():
            objective(engine, clips(step))
        engine.train()
    weights = [full_parameter(parameter) for parameter in engine.module.parameters()]
    engine.destroy()
    return weights


def configs_that_train_otherwise(
    world: World, task: str, stage: int, configs: list[RecomputeConfig]
) -> list[str]:
    expected = train(world, task, stage, NONE)
    return [name(config) for config in configs if not same(train(world, task, stage, config), expected)]


def test_sharded_training_goes_on_as_without_recompute() -> None:
    configs = [RecomputeConfig(mode="attention"), RecomputeConfig(mode="full", offload_to_cpu=True)]
    assert run_ranks(configs_that_train_otherwise, 2, "finetune", 3, configs) == [[], []]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("task", TASKS)
def test_every_mode_trains_as_without_recompute_at_every_stage(task: str, stage: int) -> None:
    assert run_ranks(configs_that_train_otherwise, 2, task, stage, SAVING) == [[], []]


WIDTH, DEPTH, TOKENS = 64, 4, 384
# Activations that a block keeps, in tensors of n x D: the inputs of two norms, of qkv, of attention (3), of
# the output projection, of the MLP and of GELU (4); without any recompute also the output of GELU (4).
ALL_BUT_GELU = 1 + 1 + 1 + 3 + 1 + 1 + 4
KEPT = {
    "none": (ALL_BUT_GELU + 4) * DEPTH,
    "gelu": ALL_BUT_GELU * DEPTH,
    "attention": (ALL_BUT_GELU - 4) * DEPTH,
    "mlp": (ALL_BUT_GELU - 4) * DEPTH,
    "blocks": (ALL_BUT_GELU + 1) * DEPTH / 2,
    "full": 1 * DEPTH,
    # The offloaded copies (made on a CPU too), and the stack's own input, which its caller holds.
    "full-offloaded": 1 * DEPTH + 1,
}


def live_after_forward(config: RecomputeConfig) -> float:
    """Return the memory that a stack holds after its forward pass, in tensors of n x D, less its output."""
    stack = Blocks(TransformerShape(WIDTH, DEPTH, 4))
    apply_recompute(stack, config)
    output: list[Tensor] = []

    def forward() -> None:
        x_BnD = torch.ones(BATCH, TOKENS, WIDTH).requires_grad_()
        output.append(stack(x_BnD, torch.arange(BATCH)))

    live_bytes = track_allocations(forward, torch.device("cpu")).timeline[-1][1]
    return live_bytes / (BATCH * TOKENS * WIDTH * 4) - 1


def live_by_config(_: World) -> dict[str, float]:
    return {name(config): live_after_forward(config) for config in [NONE, *SAVING] if name(config) in KEPT}


def test_a_block_keeps_what_the_formula_says() -> None:
    # The tolerance of 4 % covers statistics of norms and attention (a few values per token), and 10 KB of
    # random states per block.
    assert run_ranks(live_by_config, 1)[0] == pytest.approx(KEPT, rel=0.04)


def visible_from_outside(config: RecomputeConfig, frozen_input: bool) -> tuple[list[str], list[Any]]:
    """Return everything that a caller can observe of a stack.

    Returns:
        The names of the weights; then the output of an evaluation, the input and the gradients.
    """
    torch.manual_seed(0)
    stack = Blocks(TransformerShape(32, 2, 2), drop_path=0.5)
    x_BnD, key_B = torch.randn(BATCH, 6, 32, requires_grad=not frozen_input), torch.arange(BATCH)
    apply_recompute(stack, config)
    with torch.no_grad():
        evaluated = stack(x_BnD, key_B)
    stack(x_BnD, key_B).sum().backward()
    names = [*stack.state_dict(), *(key for key, _ in stack.named_parameters())]
    inputs = [x_BnD] if frozen_input else [x_BnD, x_BnD.grad]
    return names, [evaluated, *inputs, *(parameter.grad for parameter in stack.parameters())]


def configs_seen_from_outside(_: World) -> list[str]:
    found = []
    for config, frozen_input in itertools.product(SAVING, (False, True)):
        names, tensors = visible_from_outside(config, frozen_input)
        expected_names, expected = visible_from_outside(NONE, frozen_input)
        if names != expected_names or not same(tensors, expected):
            found.append(f"{name(config)}, frozen input: {frozen_input}")
    return found


def test_names_evaluation_and_inputs_are_as_without_recompute() -> None:
    assert run_ranks(configs_seen_from_outside, 1) == [[]]


@pytest.mark.parametrize("mode", ["attention", "mlp", "blocks"])
def test_random_states_are_neither_saved_nor_restored(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch, call, lambda *_: pytest.fail("no block draws random numbers"))
    config = experiment("finetune", RecomputeConfig(mode=mode))
    model = build_model(config).train()
    apply_recompute(model, config.recompute)
    build_objective(config)(model, clips()).backward()


def test_more_blocks_apart_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"recompute\.every.*given: 5; allowed: 2\.\.4"):
        apply_recompute(Blocks(TransformerShape(32, 4, 2)), RecomputeConfig(mode="blocks", every=5))


def test_whole_blocks_offload_only_in_a_world() -> None:
    with pytest.raises(ConfigError, match=r"recompute\.offload_to_cpu.*DeepSpeed 0\.19\.8.*join_world"):
        apply_recompute(Blocks(TransformerShape(32, 4, 2)), RecomputeConfig(mode="full", offload_to_cpu=True))


@pytest.mark.slow
def test_the_peak_of_a_step_falls_from_mode_to_mode(tmp_path: Path) -> None:
    rows = benchmark(tmp_path, "demo_pretrain", "precision=fp32")
    peak = {row["recompute"].split()[0]: row["peak_mib"] for row in rows if row["offload"] == "-"}
    assert peak["none"] > peak["gelu"] > max(peak["attention"], peak["mlp"], peak["blocks"])
    assert peak["full"] < min(peak["attention"], peak["mlp"], peak["blocks"])
