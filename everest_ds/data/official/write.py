"""Output of an indexed data set: manifests, class names, a list of missing videos, and training configs."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from everest_ds.data.official.folder_tree import Indexed
from everest_ds.data.official.registry import OfficialDataset
from everest_ds.data.video_list import write_manifest
from everest_ds.errors import DataError
from everest_ds.log import logger
from everest_ds.output_paths import output_below

MISSING_FILE = "missing.txt"
_OTHER_FILES = ("classes.txt", MISSING_FILE, "pretrain.yaml", "finetune.yaml")


def write_index(
    dataset: OfficialDataset, indexed: Indexed, out: Path, inputs: Collection[Path] = ()
) -> dict[str, Path]:
    """Write `<split>.txt`, `classes.txt`, `missing.txt`, `pretrain.yaml` and `finetune.yaml` into `out`.

    A split without any existing file gets no manifest.

    Args:
        dataset: the data set.
        indexed: its videos and labels.
        out: folder to write to.
        inputs: the files that the index was read from, resolved.

    Returns:
        The manifests, by split.

    Raises:
        DataError: if `out` cannot be written.
        UsageError: if a file would lie outside `out`, or overwrite one of `inputs`.
    """
    manifests = {split: out / f"{split}.txt" for split, samples in indexed.splits.items() if samples}
    for name in (*(file.name for file in manifests.values()), *_OTHER_FILES):
        output_below(out, Path(name), inputs)
    lines = [f"{split} {name}\n" for split, names in indexed.missing.items() for name in names]
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split, manifest in manifests.items():
            write_manifest(manifest, indexed.splits[split], out)
        (out / "classes.txt").write_text("".join(f"{name}\n" for name in indexed.classes), encoding="utf-8")
        (out / MISSING_FILE).write_text("".join(lines), encoding="utf-8")
        write_recipes(out, _configs(dataset, indexed, out.absolute(), manifests))
    except OSError as error:
        raise DataError(f"{out}: cannot write the data set", given=error.strerror) from None
    return manifests


def write_recipes(out: Path, recipes: Mapping[str, Mapping[str, Any]]) -> dict[str, Path]:
    """Write `<task>.yaml` for every task into `out`; a file of that name that differs is kept as `.bak`."""
    files = {task: out / f"{task}.yaml" for task in recipes}
    for task, file in files.items():
        text = (
            "# Written by `everest-ds data index`. Settings that are not listed are those of `base`.\n"
            + yaml.safe_dump(dict(recipes[task]), sort_keys=False)
        )
        if file.is_file() and file.read_text(encoding="utf-8") != text:
            old = file.with_name(f"{file.name}.bak")
            os.replace(file, old)
            logger.warning("%s: written anew; the file that was there is now %s", file, old)
        file.write_text(text, encoding="utf-8")
    return files


def _configs(
    dataset: OfficialDataset, indexed: Indexed, out: Path, manifests: Mapping[str, Path]
) -> dict[str, dict[str, Any]]:
    train = str(out / "train.txt") if "train" in manifests else None
    evaluated = str(out / f"{dataset.evaluated_on}.txt") if dataset.evaluated_on in manifests else None
    names = str(out / "classes.txt")
    finetune = {"train": train, "val": evaluated, "test": evaluated, "class_names": names}
    return {
        "pretrain": {"base": dataset.recipes["pretrain"], "data": {"train": train}},
        "finetune": {
            "base": dataset.recipes["finetune"],
            "model": {"num_classes": len(indexed.classes)},
            "data": finetune,
        },
    }
