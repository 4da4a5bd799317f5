"""Tests of counted compute: it equals the closed formula, is split by module, and has no side effects."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from everest_ds.config import Experiment
from everest_ds.config.schema import RecomputeConfig
from everest_ds.costs.compute import ComputePrediction, count_parameters, predict_macs
from everest_ds.models import build_model
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.profiling.mac_counter import (
    ComputeCount,
    count_experiment,
    count_forward,
    count_training_step,
    macs_by_part,
)
from tests.models import TASKS_AND_SELECTIONS, experiment, random_clips

PUBLISHED_SIZE: dict[str, Any] = {"num_frames": 16, "image_size": 224}
NO_GRADIENT, OF_WEIGHTS_ONLY, OF_BOTH = 1, 2, 3  # cost of a training step in forward passes
TRAINING_FACTOR = {"score": NO_GRADIENT, "embed": OF_WEIGHTS_ONLY}


def predicted_parts(predicted: ComputePrediction) -> dict[str, int]:
    return {part: getattr(predicted, f"{part}_macs") for part in macs_by_part(ComputeCount({}, {}, {}, {}))}


def assert_counted_as_predicted(config: Experiment) -> None:
    counted, predicted = count_experiment(config), predict_macs(config)
    parts = predicted_parts(predicted)
    assert macs_by_part(counted.forward) == parts
    assert macs_by_part(counted.training_step) == {
        part: TRAINING_FACTOR.get(part, OF_BOTH) * macs for part, macs in parts.items()
    }
    assert counted.forward.macs == predicted.forward_macs
    assert counted.training_step.macs == predicted.training_macs
    assert counted.forward.layer_norm_elements == predicted.layer_norm_elements
    assert counted.training_step.layer_norm_elements == predicted.layer_norm_elements
    assert counted.literature_macs == predicted.literature_macs
    assert counted.num_parameters == count_parameters(config)


@pytest.mark.parametrize("backbone", ["vit_small", "vit_base", "vit_large", "vit_huge"])
@pytest.mark.parametrize(("task", "selection"), TASKS_AND_SELECTIONS)
def test_counted_is_predicted_for_every_published_size(backbone: str, task: str, selection: str) -> None:
    assert_counted_as_predicted(experiment(task, selection, backbone=backbone, **PUBLISHED_SIZE))


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize(
    "arm",
    [
        {"score": "pixel"},
        {"score": "codec"},
        {"distance": "l1"},
        {"distance": "cosine"},
        {"frame_oversampling": 1.5},
        {"frame_oversampling": 2.0, "distance": "cosine"},
        {"attention": "unfused"},
        {"num_frames": 12, "image_size": 96, "tubelet_size": 3},
    ],
)
def test_counted_is_predicted_for_every_arm(task: str, arm: dict[str, Any]) -> None:
    assert_counted_as_predicted(experiment(task, "rero", **arm))


@pytest.mark.parametrize("distance", ["l2", "cosine"])
def test_a_sketch_costs_its_map_once_a_step_and_as_predicted_for_each_clip(distance: str) -> None:
    config = experiment("pretrain", "rero", score="sketch", distance=distance)
    one, two = (count_experiment(config, batch_size) for batch_size in (1, 2))
    predicted = predict_macs(config)
    assert two.forward.macs - one.forward.macs == predicted.forward_macs
    assert two.training_step.macs - one.training_step.macs == predicted.training_macs


@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_fused_attention_counts_as_unfused_does(task: str) -> None:
    """Fused and unfused attention have equal counts, also in the backward pass and by part.

    This runs on a CPU, where the fused kernel is one operator; the meta device decomposes it.
    """
    counts = []
    for attention in ("fused", "unfused"):
        config = experiment(task, "rero", attention=attention)
        model, clips, key = build_model(config), random_clips(config, 1), torch.zeros(1).long()
        step = count_training_step(lambda: loss_of(model(clips, key)), model)  # noqa: B023, called at once
        counts.append((count_forward(model, clips, key).macs, step.macs, macs_by_part(step)))
        names = step.macs_by_operator
        assert any("scaled_dot_product" in name for name in names) == (attention == "fused")
    assert counts[0] == counts[1]


def loss_of(output: object) -> Tensor:
    return output.sum() if isinstance(output, Tensor) else output.loss  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["attention", "mlp", "blocks"])
def test_recomputed_work_belongs_to_the_module_that_does_it_again(mode: str) -> None:
    config = experiment("pretrain", "rero")
    model, clips, key = build_model(config), random_clips(config, 1), torch.zeros(1).long()
    plain = count_training_step(lambda: model(clips, key).loss, model).macs_by_module
    apply_recompute(model, RecomputeConfig(mode=mode))
    recomputing = count_training_step(lambda: model(clips, key).loss, model).macs_by_module

    def is_repeated(module: str) -> bool:
        block, _, part = module.partition(".attention" if ".attention" in module else ".mlp")
        if mode == "blocks":  # recomputes the first of every two blocks
            return ("blocks." in module or "decoder." in module) and int(block.rpartition(".")[2]) % 2 == 0
        return f".{mode}" in module

    # A training step costs three forward passes, and four with recomputation.
    assert recomputing == {name: n // 3 * 4 if is_repeated(name) else n for name, n in plain.items()}


def test_each_module_is_told_apart_in_both_passes() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.GELU(), nn.Sequential(nn.Linear(8, 2)))
    x = torch.randn(3, 4)
    assert count_forward(model, x).macs_by_module == {"0": 3 * 4 * 8, "2.0": 3 * 8 * 2}
    step = count_training_step(lambda: model(x).square().sum(), model)
    assert step.macs_by_module == {"0": 2 * 3 * 4 * 8, "2.0": 3 * 3 * 8 * 2}


def test_work_outside_of_the_model_has_an_empty_path() -> None:
    model, projection = nn.Linear(4, 8), torch.randn(8, 2)
    step = count_training_step(lambda: (model(torch.randn(3, 4)) @ projection).sum(), model)
    assert step.macs_by_module == {"": 2 * 3 * 8 * 2 + 2 * 3 * 4 * 8}


def test_inference_mode_counts_the_same() -> None:
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), torch.randn(3, 4)
    with torch.inference_mode():
        assert count_forward(model, x) == count_forward(model, x)
        assert count_forward(model, x).macs == 3 * (4 * 8 + 8 * 2)


def test_counting_leaves_gradients_modes_and_hooks_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    model[1].eval()
    gradient = model[0].weight.grad = torch.ones(4, 4)
    count_forward(model, torch.randn(2, 4))
    count_training_step(lambda: model(torch.randn(2, 4)).sum(), model)
    assert model[0].weight.grad is gradient and gradient.eq(1).all() and model[0].bias.grad is None
    assert model.training and not model[1].training
    assert not model[0]._forward_hooks and not model[0]._forward_pre_hooks
