"""Tests of recipe families: their members, the order of merging, and the names of the members."""

from __future__ import annotations

from pathlib import Path

import pytest

from everest_ds.config import load_experiment, recipe_names
from everest_ds.errors import ConfigError

FAMILY = """
base: common/shared.yaml
schedule: {epochs: 50}
run: {dir: "runs/family_{variant}", seed: 1}
model: {init_from: "runs/start_{model}"}
variants:
  backbone: {vit_base: {run: {seed: 2}}}
  method: {videomae: {run: {seed: 3}, schedule: {epochs: 60}}}
  pair: {vit_base_videomae: {run: {seed: 4}}}
  frames: {64f: {model: {num_frames: 64}, run: {log_every_steps: 64}, schedule: {epochs: 70}}}
"""
SHARED = """
task: pretrain
variants:
  backbone: {vit_small: {model: {backbone: vit_small}}, vit_base: {model: {backbone: vit_base}}}
  method: {everest: {tokens: {selection: rero}}, videomae: {tokens: {selection: tube}}}
"""


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "shared.yaml").write_text(SHARED)
    (tmp_path / "family.yaml").write_text(FAMILY)
    (tmp_path / "single.yaml").write_text("base: family_vit_base\nrun: {dir: runs/single}\n")
    monkeypatch.setattr("everest_ds.config.recipes.RECIPES", tmp_path)
    return tmp_path


def test_a_member_is_named_by_backbone_then_method_unless_that_is_the_first_then_frames(
    recipes: Path,
) -> None:
    members = ["vit_small", "vit_small_videomae", "vit_base", "vit_base_videomae"]
    names = [f"family_{member}{frames}" for member in members for frames in ("", "_64f")]
    assert recipe_names() == [*names, "single"]


def test_the_more_is_said_the_later_it_is_merged(recipes: Path) -> None:
    seeds = {name: load_experiment(name).run.seed for name in recipe_names()}
    assert list(seeds.values()) == [1, 1, 3, 3, 2, 2, 4, 4, 2]
    both = load_experiment("family_vit_base_videomae")
    assert (both.model.backbone, both.tokens.selection, both.schedule.epochs) == ("vit_base", "tube", 60)
    longer = load_experiment("family_vit_base_videomae_64f")
    assert (longer.model.num_frames, longer.tokens.selection, longer.schedule.epochs) == (64, "tube", 70)


def test_a_members_name_is_filled_in_and_a_member_can_be_a_base(recipes: Path) -> None:
    assert load_experiment("family_vit_small_videomae").run.dir == Path("runs/family_vit_small_videomae")
    longer = load_experiment("family_vit_small_videomae_64f")
    assert longer.run.dir == Path("runs/family_vit_small_videomae_64f")
    assert longer.model.init_from == Path("runs/start_vit_small_videomae")
    single = load_experiment("single")
    assert (single.run.dir, single.model.backbone) == (Path("runs/single"), "vit_base")


def test_a_family_is_no_recipe(recipes: Path) -> None:
    with pytest.raises(ConfigError, match="several recipes, .* fix: name one, such as family_vit_small"):
        load_experiment(recipes / "family.yaml")
