"""Tables of features on the disk: `.npz`, or `.parquet` where pyarrow is installed."""

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
    """One row a video.

    Attributes:
        video: names (n,).
        label: int64 (n,), -1 where there is none.
        features: float32 (n, D).
        model: what they were computed with, a digest.
    """

    video: NDArray[np.str_]
    label: NDArray[np.int64]
    features: NDArray[np.float32]
    model: str


def check_name(file: Path) -> None:
    """Refuse a table that could not be written.

    Raises:
        UsageError: another suffix, or pyarrow is missing.
    """
    if file.suffix not in SUFFIXES:
        raise UsageError(f"{file}: not a table of features", given=file.suffix, allowed=" or ".join(SUFFIXES))
    if file.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise UsageError(
            f"{file}: needs pyarrow", fix="pip install 'everest-ds[parquet]', or give a file in .npz"
        )


def write_table(file: Path, table: FeatureTable) -> None:
    """Write a table; a reader sees what was there before until all of it is on the disk.

    Raises:
        DataError: it cannot be written.
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
    """Read a table.

    Raises:
        DataError: it is no table of features.
    """
    try:
        if file.suffix == ".parquet":
            return _read_parquet(file)
        with np.load(file, allow_pickle=False) as arrays:
            columns = {name: arrays[name] for name in FeatureTable._fields}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{file}: not a table of features", given=str(error).splitlines()[0]) from None
    return FeatureTable(**{**columns, "model": str(columns["model"])})


def join(tables: list[FeatureTable]) -> FeatureTable:
    """One table after the other; all of one model."""
    return FeatureTable(
        np.concatenate([table.video for table in tables]),
        np.concatenate([table.label for table in tables]),
        np.concatenate([table.features for table in tables]),
        tables[0].model,
    )


def rows_of(table: FeatureTable, index: list[int]) -> FeatureTable:
    """Some of its rows."""
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
