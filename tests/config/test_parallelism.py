"""Tests of the parallelism settings: invalid distributions are refused before a rank starts."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from everest_ds.config import Experiment, plan_ranks
from everest_ds.errors import ConfigError

# Attention heads of (encoder, decoder).
HEADS = {"vit_small": (6, 3), "vit_base": (12, 6), "vit_large": (16, 8), "vit_huge": (16, 8)}


@pytest.mark.parametrize("backbone", HEADS)
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
@pytest.mark.parametrize("degree", [2, 4, 8])
def test_degrees_that_do_not_divide_the_heads_are_refused(backbone: str, task: str, degree: int) -> None:
    tree = {
        "task": task,
        "model": {"backbone": backbone, "num_classes": 5},
        "parallelism": {"tensor": degree},
    }
    heads = HEADS[backbone][: 2 if task == "pretrain" else 1]
    if all(count % degree == 0 for count in heads):
        Experiment.model_validate(tree)
        return
    allowed = ", ".join(str(t) for t in (1, 2, 4, 8) if all(count % t == 0 for count in heads))
    with pytest.raises(
        ValidationError, match=f"tensor={degree} does not divide the heads.*allowed: {allowed}"
    ):
        Experiment.model_validate(tree)


def test_ranks_that_the_degree_does_not_divide_are_refused() -> None:
    config = Experiment.model_validate(
        {"task": "finetune", "model": {"num_classes": 5}, "parallelism": {"tensor": 4}}
    )
    assert plan_ranks(config, 8).data_parallel_degree == 2
    with pytest.raises(ConfigError, match="given: tensor=4, 6 ranks; allowed: a multiple of 4 ranks"):
        plan_ranks(config, 6)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"parallelism": {"zero_stage": 1, "offload_to_cpu": True}}, "needs zero_stage 2 or 3, not 1"),
        ({"parallelism": {"offload_to_cpu": True, "ds_config": "my.json"}}, "offload in that file"),
        ({"parallelism": {"zero_stage": 2, "offload_to_nvme": "/disk"}}, "needs zero_stage 3, not 2"),
        (
            {"parallelism": {"zero_stage": 3, "offload_to_nvme": "/disk", "offload_to_cpu": True}},
            "are both set",
        ),
        ({"recompute": {"mode": "full", "partition": True}}, "mode=full and parallelism.tensor=1"),
        (
            {"recompute": {"partition": True}, "parallelism": {"tensor": 2}},
            "mode=none and parallelism.tensor=2",
        ),
    ],
)
def test_settings_without_effect_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Experiment.model_validate({"task": "pretrain", **sections})


def test_stage_0_leaves_out_no_step() -> None:
    tree: dict[str, Any] = {"task": "pretrain", "precision": "fp32", "run": {"max_skipped_steps": 3}}
    Experiment.model_validate({**tree, "parallelism": {"zero_stage": 1}})
    with pytest.raises(ValidationError, match=r"max_skipped_steps is set at parallelism.zero_stage=0"):
        Experiment.model_validate({**tree, "parallelism": {"zero_stage": 0}})
