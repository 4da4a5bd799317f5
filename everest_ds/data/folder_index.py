"""Output of an indexed folder of classes: manifests, class names, and recipes that fit the number of videos.

The recipes follow those of UCF101, the smallest data set with published settings for training from scratch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from everest_ds.config.sections import REFERENCE_BATCH
from everest_ds.data.official.write import write_recipes
from everest_ds.data.video_list import Sample, write_manifest
from everest_ds.errors import DataError
from everest_ds.output_paths import output_below

_LIKE = "ucf101_{task}_vit_base"
_PUBLISHED_EPOCHS, _PUBLISHED_VIDEOS = 3200, 9537  # of pre-training on UCF101
_FEWEST_EPOCHS = 800  # as on Kinetics-400
_STEPS_PER_EPOCH = 4  # at least
_OTHER_FILES = ("classes.txt", "pretrain.yaml", "finetune.yaml")
_RANKS = 8  # at most this power of two divides the batch


def write_folder_index(
    out: Path, name: str, splits: Mapping[str, Sequence[Sample]], classes: Sequence[str]
) -> dict[str, Path]:
    """Write `<split>.txt`, `classes.txt`, `pretrain.yaml` and `finetune.yaml` into `out`.

    A split without a video gets no manifest, and a single class no recipe for fine-tuning.

    Args:
        out: the folder to write to.
        name: name of the data set.
        splits: the samples of `train`, `val` and `test`.
        classes: class names, in label order.

    Returns:
        The recipes, by task.

    Raises:
        DataError: if there is no training video, or `out` cannot be written.
        UsageError: if a file would lie outside `out`.
    """
    manifests = {split: out.absolute() / f"{split}.txt" for split, samples in splits.items() if samples}
    if "train" not in manifests:
        fix = "lower --val and --test, or add videos"
        raise DataError(
            "no video is left for training", given=f"{sum(map(len, splits.values()))} videos", fix=fix
        )
    for file in (*(manifest.name for manifest in manifests.values()), *_OTHER_FILES):
        output_below(out, Path(file), ())
    try:
        out.mkdir(parents=True, exist_ok=True)
        for split, manifest in manifests.items():
            write_manifest(manifest, splits[split], manifest.parent)
        names = out.absolute() / "classes.txt"
        names.write_text("".join(f"{each}\n" for each in classes), encoding="utf-8")
        recipes = folder_recipes(name, manifests, len(splits["train"]), names, len(classes))
        return write_recipes(out, recipes)
    except OSError as error:
        raise DataError(f"{out}: cannot write the index", given=error.strerror) from None


def folder_recipes(
    name: str, splits: Mapping[str, Path], num_train: int, class_names: Path, num_classes: int
) -> dict[str, dict[str, Any]]:
    """Return the settings of pre-training and, if there are two classes or more, of fine-tuning.

    Args:
        name: name of the data set, for the folders of its runs.
        splits: the manifests by split; `val` and `test` may be missing.
        num_train: number of training videos.
        class_names: the file of class names.
        num_classes: number of classes.
    """
    train, evaluated = str(splits["train"]), splits.get("val", splits.get("test"))
    epochs = round(_PUBLISHED_EPOCHS * _PUBLISHED_VIDEOS / num_train, -2)
    recipes: dict[str, dict[str, Any]] = {
        "pretrain": {
            "base": _LIKE.format(task="pretrain"),
            "data": {"train": train},
            "schedule": {"epochs": int(min(_PUBLISHED_EPOCHS, max(_FEWEST_EPOCHS, epochs)))},
            "batch": _batch(num_train, REFERENCE_BATCH),
            "run": {"dir": f"runs/{name}_pretrain"},
        }
    }
    if num_classes > 1:
        evaluation = {
            "val": None if evaluated is None else str(evaluated),
            "test": str(splits.get("test", evaluated)) if evaluated else None,
        }
        recipes["finetune"] = {
            "base": _LIKE.format(task="finetune"),
            "model": {"num_classes": num_classes, "init_from": f"runs/{name}_pretrain"},
            "data": {"train": train, **evaluation, "class_names": str(class_names)},
            "batch": _batch(num_train, REFERENCE_BATCH // 2),
            "run": {"dir": f"runs/{name}_finetune"},
        }
    return recipes


def _batch(num_videos: int, most: int) -> dict[str, int]:
    """Return a global batch that is a power of two and can be divided over 1, 2, 4 or 8 ranks."""
    size = min(most, 2 ** (max(1, num_videos // _STEPS_PER_EPOCH).bit_length() - 1))
    return {"micro_batch_size": max(1, size // _RANKS), "global_batch_size": size}
