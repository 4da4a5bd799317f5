"""Rows that compare the published tables with our figures: one per cell, plus those of our own sparse path.

The sparse path scores all tokens of a clip but embeds only the kept ones.

The rows are written to report.json with these keys: table, method, backbone, column, published, value, kind,
gap_pct, note.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from everest_ds.config.schema import Experiment
from everest_ds.efficiency.published import Cell
from everest_ds.efficiency.published_memory import ASSUMPTIONS, predict_published_memory
from everest_ds.efficiency.systems import (
    NUM_RANKS,
    SYSTEMS,
    Figure,
    FigureKind,
    OwnModel,
    Subject,
    System,
    memory_at,
)
from everest_ds.profiling.mac_counter import count_experiment, macs_by_part

OURS = "EVEREST-DS"  # the method of rows about our own sparse path
_GIGA = 1e9
_count_once = cache(count_experiment)


@dataclass(frozen=True)
class ComparisonRow:
    """One of our figures next to the published one.

    Attributes:
        table: name of the published table.
        method: name of the system.
        backbone: name of the backbone.
        column: name of the column.
        published: the figure as printed; None if none was published.
        value: our figure, in the column's unit; None if there is none.
        kind: origin of `value`; `published` if there is no value.
        gap_pct: difference of `value` from `published`, in percent (in the table of reductions, in
            percentage points).
        note: remark on the figure.
    """

    table: str
    method: str
    backbone: str
    column: str
    published: float | str | None
    value: float | str | None
    kind: FigureKind
    gap_pct: float | None
    note: str


def build_rows(
    cells: Sequence[Cell], on_progress: Callable[[int], None] = lambda done: None
) -> list[ComparisonRow]:
    """Return the rows of `cells` in their order, calling `on_progress` with the number of cells done."""
    rows = []
    for done, cell in enumerate(cells, start=1):
        rows += _rows_of(cell)
        on_progress(done)
    return rows


def make_row(cell: Cell, figure: Figure | None, why: str = "") -> ComparisonRow:
    """Return the row of a cell with our `figure`; if there is none, `why` gives the reason in the note."""
    where = (cell.table, cell.method, cell.backbone, cell.column, cell.published)
    if figure is None:
        return ComparisonRow(*where, value=None, kind="published", gap_pct=None, note=why)
    return ComparisonRow(
        *where, round(figure.value, 3), figure.kind, gap_pct(cell.published, figure.value), figure.note
    )


def gap_pct(published: float | str | None, value: float) -> float | None:
    """Return how far `value` lies above the published number, in percent; None if that is not a number."""
    if published is None or isinstance(published, str):
        return None
    return round(100 * (value - published) / published, 2)


def _rows_of(cell: Cell) -> list[ComparisonRow]:
    """Return the row of a published cell and, for EVEREST, the row of our own sparse path."""
    if cell.table == "k400_reductions_pct":
        figure = _reduction(cell)
        points = round(figure.value - float(cell.published or 0), 2)
        return [replace(make_row(cell, figure), gap_pct=points)]
    why = _NO_FIGURE.get(cell.column) or _system(cell).pretrain_note
    rows = [make_row(cell, _FIGURES[cell.column](cell), why)]
    if cell.method == "EVEREST" and cell.column in _SPARSE_FIGURES:
        ours = replace(cell, method=OURS, published=None)
        rows.append(make_row(ours, _SPARSE_FIGURES[cell.column](cell)))
    return rows


def _reduction(cell: Cell) -> Figure:
    """Return the reduction against VideoMAE, computed from our figures of both methods."""
    column = "memory_gb" if cell.column == "memory" else cell.column
    figure = _FIGURES[column]
    before, after = (
        figure(Cell("k400", method, cell.backbone, column, None)) for method in ("VideoMAE", "EVEREST")
    )
    assert before is not None and after is not None
    return Figure(100 * (1 - after.value / before.value), after.kind, "the gap is in percentage points")


def _memory_gb(cell: Cell) -> Figure:
    value, note = predict_published_memory(cell.table, cell.method, cell.backbone)
    return Figure(value, "predicted", note)


def _parameters_m(cell: Cell) -> Figure | None:
    subject = _system(cell).finetune
    if subject is None:
        return None
    figure = subject.parameters()
    return Figure(figure.value / 1e6, figure.kind, figure.note)


# column -> our figure for a cell, from the model of that training phase
_FIGURES: dict[str, Callable[[Cell], Figure | None]] = {
    "pt_gflops": lambda cell: _in_giga(_system(cell).pretrain),
    "ft_gflops": lambda cell: _in_giga(_system(cell).finetune),
    "gflops": lambda cell: _in_giga(_system(cell).finetune),
    "memory_gb": _memory_gb,
    "parameters_m": _parameters_m,
    "pt_time": lambda cell: None,
    "top1": lambda cell: None,
}
# column -> why its cells have no figure of ours
_NO_FIGURE = {
    "pt_time": "wall-clock time needs a measurement: see --measured",
    "top1": "accuracy needs a trained model",
}


def _sparse_memory_gb(cell: Cell) -> Figure:
    """Predict the memory of our own pre-training at the batch size assumed for the published figure."""
    clips = ASSUMPTIONS[cell.table].clips_per_gpu
    peak = memory_at(_own_config(_system(cell).pretrain), clips).peak_bytes
    note = f"our pre-training, {clips} clips per GPU: bf16, fused attention, ZeRO-2; no CUDA context"
    return Figure(NUM_RANKS * peak / _GIGA, "predicted", note)


_SPARSE_FIGURES: dict[str, Callable[[Cell], Figure]] = {
    "pt_gflops": lambda cell: _sparse_gflops(_own_config(_system(cell).pretrain)),
    "ft_gflops": lambda cell: _sparse_gflops(_own_config(_system(cell).finetune)),
    "memory_gb": _sparse_memory_gb,
}


def _sparse_gflops(config: Experiment) -> Figure:
    """Count the compute of our sparse path, which scores all tokens but embeds only the kept ones."""
    forward = _count_once(config).forward
    score = macs_by_part(forward)["score"] / _GIGA
    note = f"our sparse path: scoring all tokens takes {score:.1f}, and only kept tokens are embedded"
    return Figure(forward.literature_macs / _GIGA, "counted", note)


def _own_config(subject: object) -> Experiment:
    assert isinstance(subject, OwnModel)
    return subject.config


def _system(cell: Cell) -> System:
    return SYSTEMS[cell.method, cell.backbone]


def _in_giga(subject: Subject | None) -> Figure | None:
    if subject is None:
        return None
    figure = subject.compute()
    return Figure(figure.value / _GIGA, figure.kind, figure.note)
