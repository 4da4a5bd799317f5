"""Feature tables on the disk, as `.npz` or, with pyarrow installed, as `.parquet`."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from everest_ds.errors import DataError, UsageError

SUFFIXES = (".npz", ".parquet")
UNLABELLED = -1


class FeatureTable(NamedTuple):
    """A table of features with one row per video.

    Attributes:
        video: names of the videos (n,).
        label: int64 labels (n,), -1 for a video without a label.
        features: float32 feature vectors (n, D).
        model: digest of the model and settings that the features were computed with.
    """

    video: NDArray[np.str_]
    label: NDArray[np.int64]
    features: NDArray[np.float32]
    model: str


def check_table_file(file: Path) -> None:
    """Check that a table can be written under the given file name.

    Raises:
        UsageError: if the suffix is not supported, or pyarrow is missing for `.parquet`.
    """
    if file.suffix not in SUFFIXES:
        raise UsageError(
            f"{file}: not a file name for a feature table", given=file.suffix, allowed=" or ".join(SUFFIXES)
        )
    if file.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UsageError(
            f"{file}: pyarrow is not installed", fix="pip install 'everest-ds[parquet]', or give a .npz file"
        )


def write_table(file: Path, table: FeatureTable) -> None:
    """Write a table atomically: a reader sees the previous file until the new one is complete.

    Raises:
        DataError: if the table cannot be written.
    """
    temporary = file.with_name(f".{file.stem}.tmp{file.suffix}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            _write_parquet(temporary, table)
        else:
            np.savez(temporary, **table._asdict())
        os.replace(temporary, file)
    except OSError as error:
        raise DataError(f"{file}: cannot be written", given=error.strerror) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_table(file: Path) -> FeatureTable:
    """Read a feature table.

    Raises:
        DataError: if the file is not a feature table.
    """
    try:
        if file.suffix == ".parquet":
            return _read_parquet(file)
        with np.load(file, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in FeatureTable._fields}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file}: not a feature table", given=str(error).splitlines()[0]) from None
    return FeatureTable(**{**columns, "model": str(columns["model"])})


def join(tables: list[FeatureTable]) -> FeatureTable:
    """Concatenate tables of the same model."""
    return FeatureTable(
        np.concatenate([table.video for table in tables]),
        np.concatenate([table.label for table in tables]),
        np.concatenate([table.features for table in tables]),
        tables[0].model,
    )


def rows_of(table: FeatureTable, index: list[int]) -> FeatureTable:
    """Return a table of the rows at the given indices."""
    return FeatureTable(table.video[index], table.label[index], table.features[index], table.model)


def _write_parquet(file: Path, table: FeatureTable) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = pyarrow.array(table.features.reshape(-1))
    columns = {
        "video": pyarrow.array(table.video.tolist(), pyarrow.string()),
        "label": pyarrow.array(table.label),
        "features": pyarrow.FixedSizeListArray.from_arrays(rows, table.features.shape[1]),
    }
    parquet.write_table(pyarrow.table(columns, metadata={"model": table.model}), file)


def _read_parquet(file: Path) -> FeatureTable:
    from pyarrow import parquet

    table = parquet.read_table(file)
    features = table["features"].combine_chunks()
    return FeatureTable(
        np.array(table["video"].to_pylist()),
        table["label"].to_numpy(),
        features.values.to_numpy().reshape(len(features), -1),
        table.schema.metadata[b"model"].decode(),
    )
