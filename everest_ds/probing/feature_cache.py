"""The cache of frozen features: every clip is encoded once for each encoder, also after interruptions.

The features of a data set lie in a folder of their own, whose name is a digest of the weights, the settings,
the views and the names of the clips. Finished features are saved every 64 clips. Labels are not stored.

Shape legend: N clips, G cells, D width.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from everest_ds.data.ledger import Problem
from everest_ds.data.reading import Failure
from everest_ds.data.video_list import Sample, names_and_labels
from everest_ds.durable_files import replacing
from everest_ds.errors import DataError
from everest_ds.inference.features import feature_digest
from everest_ds.inference.views import Views, over_views
from everest_ds.probing.accuracy import FeatureSet
from everest_ds.probing.frozen_encoder import GridFeatures

_PART = 64  # clips


class CachedFeatures(NamedTuple):
    """The features of all clips that could be read.

    Attributes:
        features: rows in the order of the samples.
        num_known: number of clips whose features were cached before.
        problems: samples without features, with the reason.
    """

    features: FeatureSet
    num_known: int
    problems: list[Problem]


class _Part(NamedTuple):
    """The arrays of a file of the cache: indices of samples (n,), float32 (n, D), float16 (n, G, D)."""

    sample: np.ndarray
    clip: np.ndarray
    cell: np.ndarray


def cached_features(
    model: GridFeatures,
    samples: Sequence[Sample],
    folder: Path,
    views: Views,
    on_progress: Callable[[int], None],
) -> CachedFeatures:
    """Return the features of labelled samples, and compute those that are not in the cache yet.

    Args:
        model: the frozen encoder, on the device to use.
        samples: labelled samples.
        folder: folder of all caches.
        views: views of each sample over which its features are averaged.
        on_progress: called with the number of samples that are done.

    Raises:
        DataError: if a file of the cache cannot be read or written, or no sample can be read.
    """
    place = folder / _key(model, samples, views)
    parts = [_read(file) for file in sorted(place.glob("[0-9]*.npz"))]
    known = {int(index) for part in parts for index in part.sample}
    missing = [index for index in range(len(samples)) if index not in known]
    on_progress(len(known))
    problems: list[Problem] = []

    def note(failure: Failure) -> None:
        problems.append(Problem(samples[missing[failure.sample]], failure.reason))

    def progress(num_views: int) -> None:
        on_progress(len(known) + num_views // views.num_views)

    wanted = [samples[index] for index in missing]
    rows = over_views(model, wanted, model.config, views, note, progress) if wanted else iter(())
    while found := list(islice(rows, _PART)):
        output = torch.stack([values for _, values in found])
        index = np.array([missing[number] for number, _ in found])
        parts.append(_Part(index, output[:, 0].numpy(), output[:, 1:].half().numpy()))
        _write(place / f"{index[0]:08d}.npz", parts[-1])
    if not parts:
        raise DataError(
            "none of the clips can be read", given=f"{problems[0].sample.name}: {problems[0].reason}"
        )
    return CachedFeatures(_in_order(parts, samples), len(known), problems)


def _in_order(parts: Sequence[_Part], samples: Sequence[Sample]) -> FeatureSet:
    index, clip, cell = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(index)
    label = torch.tensor([samples[int(row)].label for row in index[order]])
    return FeatureSet(torch.from_numpy(clip[order]), label, torch.from_numpy(cell[order]))


def _key(model: GridFeatures, samples: Sequence[Sample], views: Views) -> str:
    digest = hashlib.sha256(feature_digest(model, views).encode())
    for name, _ in names_and_labels(samples):
        digest.update(f"{name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _read(file: Path) -> _Part:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return _Part(*(arrays[name] for name in _Part._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{file}: not a file of cached features", given=str(error).splitlines()[0], fix="remove it"
        ) from None


def _write(file: Path, part: _Part) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as stream:
            np.savez(stream, **part._asdict())
    except OSError as error:
        raise DataError(
            f"{file}: cannot be written", given=error.strerror, fix="choose another --out"
        ) from None
