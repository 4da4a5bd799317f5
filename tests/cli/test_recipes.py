"""Tests of every shipped recipe at its full size: it plans, it fits, and its model can be built."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
from torch import nn

from everest_ds.config import load_experiment, recipe_names
from everest_ds.costs.compute import count_parameters
from everest_ds.costs.memory import predict_memory
from everest_ds.models.initial_weights import outline
from everest_ds.parallel.ds_config import resolve_ds_config
from everest_ds.training.plan import count_samples, describe_plan
from everest_ds.training.prediction import REFERENCE, describe_prediction, parse_gpus
from tests.cli.test_cli import run_main

DATASETS = ("k400", "ssv2", "ucf101", "hmdb51", "oscc")
BACKBONES = ("vit_small", "vit_base", "vit_large", "vit_huge")


def published() -> Iterator[str]:
    for dataset in DATASETS:
        for task in ("pretrain", "finetune"):
            for backbone in BACKBONES:
                yield from (f"{dataset}_{task}_{backbone}{method}" for method in ("", "_videomae"))


@cache
def parameters_on_meta(task: str, backbone: str, num_classes: int | None) -> int:
    config = load_experiment(f"k400_{task}_{backbone}", [f"model.num_classes={num_classes or 'null'}"])
    model: nn.Module = outline(config)
    assert all(p.is_meta for p in model.parameters())
    return sum(p.numel() for p in model.parameters())


def test_every_published_setting_has_a_recipe() -> None:
    assert set(published()) <= set(recipe_names())


# The members for 32 frames differ from those for 64 in numbers only.
PLANNED = [name for name in recipe_names() if not name.startswith("demo") and not name.endswith("_32f")]


@pytest.mark.parametrize("name", PLANNED)
def test_a_recipe_dry_runs_on_the_papers_machine(name: str) -> None:
    config, gpus = load_experiment(name), parse_gpus(REFERENCE)
    epoch = count_samples(config, planned=True)
    facts = describe_plan(config, gpus.count, planned=True)
    resolve_ds_config(config, gpus.count)
    predicted = describe_prediction(config, gpus, epoch and epoch.num_samples)
    assert " per epoch x " in facts["steps"] and facts["steps"].endswith("does not exist)")
    assert "of a GPU's 80 GB" in predicted["memory"]
    assert {"step", "epoch", "training"} <= set(predicted)
    model = config.model
    assert parameters_on_meta(config.task, model.backbone, model.num_classes) == count_parameters(config)


@pytest.mark.parametrize(
    "name, expected",
    [
        # (clips per step, base lr, epochs, keep or mask ratio), from the scripts that the recipe names
        ("ucf101_pretrain_vit_base", (8 * 24, 1e-3, 3200, 0.3)),
        ("ucf101_pretrain_vit_base_videomae", (8 * 24, 3e-4, 3200, 0.75)),
        ("hmdb51_finetune_vit_base", (8 * 16, 1e-3, 50, 0.6)),
        ("k400_pretrain_vit_huge_videomae", (64 * 16, 1.5e-4, 1600, 0.9)),
        ("k400_finetune_vit_small_videomae", (4 * 8 * 12 * 2, 5e-4, 150, None)),
        ("ssv2_finetune_vit_small_videomae", (4 * 8 * 12 * 2, 1e-3, 40, None)),
    ],
)
def test_a_recipe_says_what_its_script_says(
    name: str, expected: tuple[int, float, int, float | None]
) -> None:
    config = load_experiment(name)
    tokens = config.tokens
    ratio = {"rero": tokens.keep_ratio, "tube": tokens.mask_ratio, "none": None}[tokens.selection]
    schedule = config.schedule
    assert (config.batch.global_batch_size, schedule.base_lr, schedule.epochs, ratio) == expected


@pytest.mark.parametrize("dataset", ["k400", "ssv2", "oscc"])
@pytest.mark.parametrize("method", ["", "_videomae"])
@pytest.mark.parametrize("num_frames", [32, 64])
def test_a_recipe_for_long_clips_starts_from_16_frames_and_needs_about_their_memory(
    dataset: str, method: str, num_frames: int
) -> None:
    """Members for long clips have the positions of their initial weights, and fit into the same memory."""
    short, longer, start, start_of_long = (
        load_experiment(f"{dataset}_{task}_vit_huge{method}{frames}")
        for task in ("finetune", "pretrain")
        for frames in ("", f"_{num_frames}f")
    )
    assert longer.model.init_from == start.run.dir
    assert longer.model.position_geometry == start.model.geometry
    assert start_of_long.model.positions_from is None
    for before, now in ((short, longer), (start, start_of_long)):
        assert now.model.num_frames == num_frames and now.schedule == before.schedule
        assert now.tokens == before.tokens
        assert now.batch.global_batch_size == before.batch.global_batch_size
        assert predict_memory(now).peak_bytes == pytest.approx(predict_memory(before).peak_bytes, rel=0.02)


def test_fewer_gpus_accumulate_the_published_batch_and_others_hear_the_nearest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dry_run = ("pretrain", "k400_pretrain_vit_base", "--dry-run", "--on")
    assert run_main(monkeypatch, *dry_run, "2xA100-80GB") == 0
    assert "256 clips = 32 per rank and micro-batch x 4" in capsys.readouterr().out
    assert run_main(monkeypatch, *dry_run, "6xA6000") == 2
    assert "nearest with micro_batch_size=32: 192 or 384" in capsys.readouterr().err


def test_a_batch_too_small_for_the_reference_is_planned_on_one_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ("pretrain", "k400_pretrain_vit_base", "--dry-run", "batch.global_batch_size=32")
    assert run_main(monkeypatch, *small) == 0
    assert "1 x A100 80GB" in capsys.readouterr().out


def test_recipes_are_listed_by_family_and_filtered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "recipes", "ssv2", "huge") == 0
    printed = capsys.readouterr().out
    assert "ssv2_finetune_vit_huge_videomae" in printed and "k400" not in printed
    assert run_main(monkeypatch, "recipes", "k600") == 2
    assert "did you mean k400" in capsys.readouterr().err
