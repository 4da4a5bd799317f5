"""Tests that every ZeRO stage on every mesh of data x tensor ranks trains like one plain torch process."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from everest_ds.config.backbones import BACKBONES
from everest_ds.shipped import shipped
from tests.parallel.equality import (
    SPLITTABLE,
    STAGES,
    TASKS,
    TOLERANCE,
    assert_equal,
    assert_same_weights,
    engine_runs,
    engine_runs_on_onednn,
    experiment,
    for_tiny_models,
    plain_run,
)
from tests.ranks import run_ranks

RECOMPUTE: list[dict[str, Any]] = [
    {"mode": "attention"},
    {"mode": "mlp", "offload_to_cpu": True},
    {"mode": "blocks"},
    {"mode": "full"},
    {"mode": "full", "offload_to_cpu": True},
    {"mode": "full", "partition": True},
    {"mode": "full", "partition": True, "offload_to_cpu": True},
]


@pytest.fixture(autouse=True)
def splittable_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "vit_tiny", SPLITTABLE)


reference = lru_cache(plain_run)


def assert_stages_follow(task: str, data: int, tensor: int, stages: tuple[int, ...]) -> None:
    configs = [experiment(task, stage, data, tensor) for stage in stages]
    by_rank = run_ranks(engine_runs, data * tensor, configs)
    for stage, *runs in zip(stages, *by_rank, strict=True):
        name = f"{task}, {data} data x {tensor} tensor, ZeRO-{stage}"
        assert_equal(runs[0], reference(task), name)
        assert_same_weights(runs, name)


@pytest.mark.parametrize(
    ("task", "data", "tensor", "stages"),
    [
        ("pretrain", 1, 1, STAGES),
        pytest.param("finetune", 2, 1, STAGES, marks=pytest.mark.slow),
        pytest.param("pretrain", 1, 2, STAGES, marks=pytest.mark.slow),
        ("finetune", 2, 2, (0, 3)),
    ],
)
def test_a_mesh_follows_the_plain_loop(task: str, data: int, tensor: int, stages: tuple[int, ...]) -> None:
    assert_stages_follow(task, data, tensor, stages)


def test_a_mesh_follows_the_plain_loop_where_products_are_large() -> None:
    configs = [experiment("pretrain", stage=2, data_degree=1, tensor=2)]
    assert_equal(run_ranks(engine_runs_on_onednn, 2, configs)[0][0], reference("pretrain"), "oneDNN")


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (2, 2)])
def test_zero3_follows_the_plain_loop_where_weights_come_and_go(
    data: int, tensor: int, tmp_path: Path
) -> None:
    """Weights that ZeRO-3 releases after the forward pass and fetches again train as in the plain loop."""
    own = for_tiny_models(shipped("ds_configs") / "zero3.json", tmp_path)
    configs = [experiment(task, 3, data, tensor, ds_config=own) for task in TASKS]
    for task, *runs in zip(TASKS, *run_ranks(engine_runs, data * tensor, configs), strict=True):
        assert_equal(runs[0], reference(task), f"{task}, weights come and go")
        assert_same_weights(runs, task)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("data", "tensor"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_every_mesh_follows_the_plain_loop_at_every_stage(task: str, data: int, tensor: int) -> None:
    assert_stages_follow(task, data, tensor, STAGES)


def assert_recompute_follows(task: str, stage: int, data: int, tensor: int) -> None:
    configs = [experiment(task, stage, data, tensor, recompute) for recompute in RECOMPUTE]
    for recompute, run in zip(RECOMPUTE, run_ranks(engine_runs, data * tensor, configs)[0], strict=True):
        assert_equal(run, reference(task), f"{task}, ZeRO-{stage}, recompute {recompute}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "stage"), [("finetune", 0), ("pretrain", 1), ("finetune", 2), ("pretrain", 3)]
)
def test_every_recompute_mode_follows_the_plain_loop_under_tensor_parallelism(task: str, stage: int) -> None:
    assert_recompute_follows(task, stage, data=1, tensor=2)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2)])
def test_offload_follows_the_plain_loop(data: int, tensor: int) -> None:
    configs = [experiment("finetune", stage, data, tensor, offload=True) for stage in (2, 3)]
    for run in run_ranks(engine_runs, data * tensor, configs)[0]:
        assert_equal(run, reference("finetune"), f"{data} data x {tensor} tensor, offloaded")


def assert_bf16_stays_near_fp32(data: int, tensor: int, offload: bool = False) -> None:
    stages = (2, 3) if offload else (1, 2, 3)
    configs = [
        experiment("pretrain", stage, data, tensor, precision="bf16", offload=offload) for stage in stages
    ]
    expected = reference("pretrain").losses
    for run in run_ranks(engine_runs, data * tensor, configs)[0]:
        assert run.losses == pytest.approx(expected, rel=0.01)  # bf16 has 8 bits of mantissa
        assert run.losses != pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.slow
def test_bf16_stays_near_fp32_in_every_sharded_stage() -> None:
    assert_bf16_stays_near_fp32(data=2, tensor=1)


@pytest.mark.slow
@pytest.mark.parametrize("offload", [False, True])
def test_bf16_stays_near_fp32_under_tensor_parallelism(offload: bool) -> None:
    assert_bf16_stays_near_fp32(data=1, tensor=2, offload=offload)
