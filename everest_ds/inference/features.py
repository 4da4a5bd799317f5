"""Extraction of one feature vector per video into a table; an interrupted extraction can be resumed.

Finished rows are saved every 64 videos in `TABLE.parts/`, next to the table, and merged into the table at the
end; the next extraction starts from these parts. Unreadable videos are recorded in the ledger of the table
(`TABLE.ledger.jsonl`), as for a manifest, and are not read again unless the file changes.
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
from everest_ds.data.reading import Failure
from everest_ds.data.video_list import Sample
from everest_ds.errors import DataError
from everest_ds.inference.feature_table import (
    UNLABELLED,
    FeatureTable,
    join,
    read_table,
    rows_of,
    write_table,
)
from everest_ds.inference.views import Views, over_views

_PART = 64  # videos


class Extracted(NamedTuple):
    """Result of an extraction.

    Attributes:
        table: rows of the given videos in their order, then earlier rows of other videos; None without rows.
        num_known: number of given videos whose rows existed before.
        problems: videos without a row, with the reason.
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
    """Compute the missing rows of a feature table and write the table.

    Args:
        model: a `FeatureModel` from `load_model(..., features=True)`, on the device to use.
        samples: videos of the table, in the order of its rows.
        root: folder to which the names of the videos inside it are relative.
        file: the table.
        views: views of each video whose features are averaged.
        on_progress: called with the number of samples that are done.

    Raises:
        DataError: if the table holds features of another model or other views, or cannot be written.
    """
    store = _Store(file, feature_digest(model, views))
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
            ledger.record(missing[failure.sample], failure.reason, source="run")

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
    """A feature table, and the parts that have not been merged into it."""

    def __init__(self, file: Path, model: str) -> None:
        self.file, self.model = file, model
        self.folder = file.with_name(f"{file.name}.parts")
        self.tables = [read_table(file)] if file.is_file() else []
        self.tables += [read_table(part) for part in sorted(self.folder.glob("[0-9]*.npz"))]
        if any(table.model != model for table in self.tables):
            raise DataError(
                f"{file}: holds features of another model, other views or other tokens",
                fix="give another --out, or remove the table"
                + (f" and {self.folder}" if self.folder.is_dir() else ""),
            )

    def names(self) -> set[str]:
        """Return the names of the videos that have a row."""
        return {str(name) for table in self.tables for name in table.video}

    def add(self, table: FeatureTable) -> None:
        """Save further rows as a new part."""
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


def feature_digest(model: nn.Module, views: Views) -> str:
    """Return a digest of all inputs of the features except the videos: settings, views and weights."""
    config: Any = model.config
    digest = hashlib.sha256(json.dumps([config_entry(config.model_dump(mode="json")), views]).encode())
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()
