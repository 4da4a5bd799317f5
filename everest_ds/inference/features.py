"""Features of many videos, one vector each, in a table that grows over as many runs as it takes.

What is done is written every few videos beside the table, as `TABLE.parts/`, and becomes the table when all
are; a run that was stopped goes on there. Videos that cannot be read are named in the table's ledger
(`TABLE.ledger.jsonl`), as those of a manifest are, and not read again unless the file has changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from everest_ds.checkpoints.export import config_entry
from everest_ds.data.ledger import SUFFIX, Ledger, Problem, exclude
from everest_ds.data.manifest import Sample
from everest_ds.data.reading import Failure
from everest_ds.errors import DataError
from everest_ds.inference.table import UNLABELLED, FeatureTable, join, read_table, rows_of, write_table
from everest_ds.inference.views import Views, over_views

_PART = 64  # videos


class Extracted(NamedTuple):
    """What came of it.

    Attributes:
        table: the videos' rows in their order, then those that it had of others; None if it has none.
        num_known: rows that were there already.
        problems: videos that are not in it.
    """

    table: FeatureTable | None
    num_known: int
    problems: list[Problem]


def extract(
    model: Any,
    samples: Sequence[Sample],
    root: Path,
    file: Path,
    views: Views,
    on_progress: Callable[[int], None],
) -> Extracted:
    """Compute what is missing of a table of features, and write it.

    Args:
        model: a `FeatureModel` as `load_model(..., features=True)` gives it, on the device to use.
        samples: of the table, in its order.
        root: folder that names of videos are relative to, where they lie in it.
        file: the table.
        on_progress: told how many samples are done.

    Raises:
        DataError: the table is of another model or other views, or cannot be written.
    """
    store = _Store(file, _digest(model, views))
    names = [_name(sample, root) for sample in samples]
    ledger = Ledger.read(file.with_name(file.name + SUFFIX))
    usable = exclude(samples, ledger)
    done = store.names()
    missing = [sample for sample in usable.samples if _name(sample, root) not in done]
    settled = len(samples) - len(missing)
    on_progress(settled)
    failures: list[Problem] = []

    def note(failure: Failure) -> None:
        failures.append(Problem(missing[failure.sample], failure.reason))
        if failure.damaged:
            ledger.record(missing[failure.sample], failure.reason, by_run=True)

    def progress(num_views: int) -> None:
        on_progress(settled + num_views // views.num_views)

    rows = over_views(model, missing, model.config, views, note, progress)
    while part := list(islice(rows, _PART)):
        chosen = [missing[index] for index, _ in part]
        store.add(
            FeatureTable(
                np.array([_name(sample, root) for sample in chosen]),
                np.array([UNLABELLED if s.label is None else s.label for s in chosen], np.int64),
                np.stack([vector.numpy() for _, vector in part]),
                store.model,
            )
        )
    return Extracted(store.finish(names), len(done & set(names)), [*usable.excluded, *failures])


class _Store:
    """A table and the parts that are not in it yet."""

    def __init__(self, file: Path, model: str) -> None:
        self.file, self.model = file, model
        self.folder = file.with_name(f"{file.name}.parts")
        self.tables = [read_table(file)] if file.is_file() else []
        self.tables += [read_table(part) for part in sorted(self.folder.glob("[0-9]*.npz"))]
        if any(table.model != model for table in self.tables):
            raise DataError(
                f"{file}: holds features of another model, or of other views or tokens",
                fix="give another --out, or remove it"
                + (f" and {self.folder}" if self.folder.is_dir() else ""),
            )

    def names(self) -> set[str]:
        """Of the videos that are done."""
        return {str(name) for table in self.tables for name in table.video}

    def add(self, table: FeatureTable) -> None:
        """Keep some more rows."""
        write_table(self.folder / f"{len(self.tables):06d}.npz", table)
        self.tables.append(table)

    def finish(self, names: Sequence[str]) -> FeatureTable | None:
        """Write the table, `names` first and in their order, and remove the parts."""
        if not self.tables:
            return None
        whole = join(self.tables)
        place = {str(name): row for row, name in enumerate(whole.video)}
        others = [name for name in place if name not in set(names)]
        table = rows_of(whole, [place[name] for name in (*names, *others) if name in place])
        write_table(self.file, table)
        shutil.rmtree(self.folder, ignore_errors=True)
        return table


def _name(sample: Sample, root: Path) -> str:
    return sample.name.removeprefix(f"{root}/")


def _digest(model: nn.Module, views: Views) -> str:
    """Of all that features depend on but the videos."""
    config: Any = model.config
    digest = hashlib.sha256(json.dumps([config_entry(config.model_dump(mode="json")), views]).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
