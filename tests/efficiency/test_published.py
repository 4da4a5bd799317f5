"""Tests of the published tables: their data, and the selection of cells by name."""

from __future__ import annotations

import pytest

from everest_ds.efficiency.published import published_tables, select_cells
from everest_ds.efficiency.systems import SYSTEMS
from everest_ds.errors import UsageError


def test_every_published_row_has_a_system_and_every_system_a_row() -> None:
    cells = select_cells()
    assert {(cell.method, cell.backbone) for cell in cells} == set(SYSTEMS)


def test_tables_hold_every_published_figure() -> None:
    published = [cell for cell in select_cells() if cell.published is not None]
    by_table = {name: sum(cell.table == name for cell in published) for name in published_tables()}
    assert by_table == {
        "pretraining_cost": 4 * 2,
        "k400": 2 * 2 + 4 * 3 + 6 * 4,
        "k400_reductions_pct": 3 * 3,
        "k400_finetuning_of_other_mvas": 6 * 3,
        "parameters": 7,
    }


@pytest.mark.parametrize(
    ("models", "methods"),
    [
        (["everest"], {"EVEREST", "VideoMAE + EVEREST", "MME + EVEREST", "MVD + EVEREST"}),
        (["MVD"], {"MVD", "MVD + full-token", "MVD + EVEREST"}),
        (["mvit-s", "XViT"], {"MViT", "K-centered"}),
    ],
)
def test_models_are_methods_or_backbones_in_any_case(models: list[str], methods: set[str]) -> None:
    assert {cell.method for cell in select_cells(models=models)} == methods


@pytest.mark.parametrize(
    ("tables", "models", "says"),
    [
        (["k4000"], [], "did you mean k400"),
        ([], ["VideoMEA"], "did you mean videomae"),
        ([], ["ViT-Q"], "did you mean vit-"),
        (["pretraining_cost"], ["MViT"], "no row of pretraining_cost matches MViT"),
    ],
)
def test_unknown_names_get_the_nearest(tables: list[str], models: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        select_cells(tables, models)
