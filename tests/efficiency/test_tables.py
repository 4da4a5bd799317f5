"""Tests of our figures next to the published ones, within the project's tolerances."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from everest_ds.efficiency.peer_counts import count_peer
from everest_ds.efficiency.published import select_cells
from everest_ds.efficiency.tables import OURS, ComparisonRow, build_rows


def rows_of(table: str, *columns: str) -> list[ComparisonRow]:
    return build_rows([cell for cell in select_cells([table]) if cell.column in columns])


def find(rows: list[ComparisonRow], method: str, backbone: str, column: str) -> ComparisonRow:
    (row,) = [row for row in rows if (row.method, row.backbone, row.column) == (method, backbone, column)]
    return row


@pytest.fixture(scope="module")
def k400() -> list[ComparisonRow]:
    return rows_of("k400", "pt_gflops", "ft_gflops", "top1")


def test_all_twelve_gflops_of_videomae_and_everest_come_out_to_the_printed_digit(
    k400: list[ComparisonRow],
) -> None:
    rows = [row for row in k400 if row.method in ("VideoMAE", "EVEREST") and "gflops" in row.column]
    assert len(rows) == 12
    for row in rows:
        assert isinstance(row.value, float) and row.kind == "predicted"
        assert round(row.value, 1) == row.published


@pytest.mark.parametrize(
    ("method", "backbone", "worst_pct"),
    [
        ("MViT", "MViT-B", 0.05),
        ("K-centered", "Mformer", 0.05),
        ("ViViT FE", "ViT-L", 1.0),
        ("K-centered", "TSformer", 1.0),
        ("K-centered", "XViT", 1.0),
        ("MViT", "MViT-S", 4.0),  # reconstructed: its config was never released
    ],
)
def test_other_systems_are_counted(
    k400: list[ComparisonRow], method: str, backbone: str, worst_pct: float
) -> None:
    row = find(k400, method, backbone, "ft_gflops")
    assert row.kind == "counted" and row.gap_pct is not None and abs(row.gap_pct) <= worst_pct


def test_views_and_units_are_said(k400: list[ComparisonRow]) -> None:
    assert find(k400, "K-centered", "XViT", "ft_gflops").note.startswith("3 views of 140.7")
    images = find(k400, "K-centered", "XViT", "pt_gflops")
    assert images.value is None and images.kind == "published" and "image pre-training" in images.note
    assert "keep ratio 0.4" in find(k400, "EVEREST", "ViT-B", "pt_gflops").note
    accuracy = find(k400, "EVEREST", "ViT-B", "top1")
    assert (accuracy.value, accuracy.kind, accuracy.gap_pct) == (None, "published", None)


def test_beside_every_everest_cell_stands_our_sparse_path(k400: list[ComparisonRow]) -> None:
    ours = [row for row in k400 if row.method == OURS]
    assert len(ours) == 6 and {row.kind for row in ours} == {"counted"}
    assert find(k400, OURS, "ViT-B", "pt_gflops").value == pytest.approx(21.496, abs=1e-3)


def test_the_note_on_the_sampler_is_what_the_sampler_counts() -> None:
    macs = count_peer("kcentered_xvit").forward.macs_by_module
    assert sum(value for path, value in macs.items() if path.startswith("sampler")) / 1e9 == pytest.approx(
        3.8, abs=0.05
    )


def test_the_note_on_mvd_is_what_its_parts_count() -> None:
    macs = count_peer("mvd").forward.macs_by_module
    student = sum(value for path, value in macs.items() if path.startswith("student"))
    assert student / 1e9 == pytest.approx(77.3, abs=0.05)
    assert (sum(macs.values()) - student) / 1e9 == pytest.approx(320.8, abs=0.05)


def test_compute_reductions_are_within_a_point() -> None:
    rows = rows_of("k400_reductions_pct", "pt_gflops", "ft_gflops")
    assert len(rows) == 6
    assert all(row.gap_pct is not None and abs(row.gap_pct) <= 1 for row in rows)


def test_parameters_are_published_to_their_digits_or_their_gap_is_small() -> None:
    rows = rows_of("parameters", "parameters_m")
    gaps = {(row.method, row.backbone): row.gap_pct for row in rows}
    assert all(gap is not None and abs(gap) < 0.6 for gap in gaps.values())


def test_a_row_is_the_contract() -> None:
    (row,) = build_rows([cell for cell in select_cells(["k400"], ["MViT-B"]) if cell.column == "ft_gflops"])
    assert asdict(row) == {
        "table": "k400",
        "method": "MViT",
        "backbone": "MViT-B",
        "column": "ft_gflops",
        "published": 70.5,
        "value": 70.479,
        "kind": "counted",
        "gap_pct": -0.03,
        "note": "the max-pooling variant",
    }
