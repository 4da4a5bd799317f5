"""The input files of a run, except for its videos, checked before training, which takes days.

After training they could no longer be changed, because they belong to the run's config.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from everest_ds.checkpoints.names import list_checkpoints
from everest_ds.config import Experiment
from everest_ds.data.data_set import read_data_set
from everest_ds.data.store.index import is_store, open_store
from everest_ds.data.store.layout import ShardedStore
from everest_ds.data.store.token_cache import open_token_cache
from everest_ds.data.video_list import read_class_names
from everest_ds.errors import CheckpointError, ConfigError, DataError
from everest_ds.log import logger
from everest_ds.training.run_folder import RunFolder

PROBE_SPLITS = ("probe_train", "probe_test")
_SPLITS = {"pretrain": ("train", *PROBE_SPLITS), "finetune": ("train", "val"), "evaluate": ("test",)}


def manifest_of(config: Experiment, split: str) -> Path:
    """Return the manifest, or the frame store, of `data.<split>`.

    Raises:
        ConfigError: if the config names no manifest for the split, wants to stage videos that are not in a
            store, or names a store although its score reads motion vectors.
        DataError: if there is no such file or store.
    """
    manifest: Path | None = getattr(config.data, split)
    key = f"data.{split}"
    if manifest is None:
        raise ConfigError(f"{key} is not set", fix=f"name a manifest: {key}=path/to/list.txt")
    if is_store(manifest):
        _check_score(config, split, manifest)
        return manifest
    if manifest.is_file():
        if split == "train" and config.data.stage is not None and config.data.token_cache is None:
            raise ConfigError(
                "data.stage is set, but data.train is not a frame store",
                given=str(manifest),
                allowed="a frame store, or any videos with a token cache in data.token_cache",
                fix=f"`everest-ds data pack {shlex.quote(str(manifest))} --out STORE` makes a store, for"
                " data.train=STORE; data.stage=null reads the videos where they are",
            )
        return manifest
    is_folder = manifest.is_dir()
    source = shlex.quote(str(manifest)) if is_folder else "FOLDER"
    without = "" if split == "train" else f", or leave it out: {key}=null"
    raise DataError(
        f"{key}: {'this folder is not a frame store' if is_folder else 'no such manifest'}",
        given=str(manifest.absolute()),
        fix=f"`everest-ds data index {source} --out LISTS` writes manifests of a folder of videos{without}",
    )


def reads_motion(config: Experiment, split: str) -> bool:
    """Return whether the motion vectors of `data.<split>` are read; probes see all tokens of a clip."""
    cached = split == "train" and config.data.token_cache is not None
    return config.tokens.reads_motion and not cached and split not in PROBE_SPLITS


def _check_score(config: Experiment, split: str, store: Path) -> None:
    if reads_motion(config, split):
        raise ConfigError(
            f"tokens.score={config.tokens.score} reads motion vectors, and data.{split} is a frame store,"
            " whose pictures are coded one by one",
            given=str(store),
            allowed="a manifest of video files; for data.train also a token cache, filled from video files",
            fix="tokens.score=pixel scores the frames of a store",
        )


def splits_of(command: str, config: Experiment) -> list[str]:
    """Return the splits `data.<split>` that the command `pretrain`, `finetune` or `evaluate` reads."""
    unused = () if config.run.probe_every_steps is not None else PROBE_SPLITS
    optional = ("val", *PROBE_SPLITS)
    return [
        split
        for split in _SPLITS[command]
        if split not in unused and (split not in optional or getattr(config.data, split) is not None)
    ]


def stores_to_stage(config: Experiment, command: str) -> list[ShardedStore]:
    """Open the frame stores and the token cache that `command` reads; videos of a manifest cannot be staged.

    Raises:
        EverestError: if one of them cannot be read, or does not suit the run.
    """
    splits, stores = splits_of(command, config), list[ShardedStore]()
    if "train" in splits and config.data.token_cache is not None:
        from everest_ds.training.samples import read_training_samples  # imports torch, which is slow

        splits.remove("train")
        usable = read_training_samples(config, RunFolder(config.run.dir).excluded)
        cache = open_token_cache(config, usable.samples)
        assert cache is not None
        stores.append(cache)
    sources = [manifest_of(config, split) for split in splits]
    for source in sources:
        if not is_store(source):
            logger.info("%s is not a frame store, so data.stage does not apply to its videos", source)
    return stores + [open_store(source) for source in sources if is_store(source)]


def class_names(config: Experiment) -> list[str]:
    """Return the class names from `data.class_names`; without that file, the class indices as text.

    Raises:
        DataError: if the file does not exist or is no list of names.
        ConfigError: if the number of names is not model.num_classes.
    """
    file, count = config.data.class_names, config.model.num_classes or 0
    if file is None:
        return [str(label) for label in range(count)]
    if not file.is_file():
        raise DataError("data.class_names: no such file", given=str(file.absolute()))
    names = read_class_names(file)
    if len(names) != count:
        raise ConfigError(
            f"{file}: the number of names differs from model.num_classes",
            given=f"{len(names)} names",
            allowed=f"{count} names, one per line",
        )
    return names


def check_initial_weights_exist(config: Experiment) -> None:
    """Check that the weights that `model.init_from` names exist, unless the run resumes from its own.

    Raises:
        CheckpointError: if they do not exist.
    """
    source = _initial_weights(config)
    if source is None or source.exists():
        return
    raise CheckpointError(
        "model.init_from: no weights found",
        given=str(source.absolute()),
        allowed="a run that has trained, a checkpoint or a file of weights; unless it is set, a recipe for"
        " fine-tuning names the run folder of its recipe for pre-training",
        fix="pre-train first, set model.init_from=PATH, or start from random weights: model.init_from=null",
    )


def check_initial_weights_fit(config: Experiment) -> None:
    """Check that the weights of `model.init_from` fit the model; weights that do not exist yet pass.

    Raises:
        CheckpointError: if they do not fit.
    """
    source = _initial_weights(config)
    if source is None or not source.exists():
        return
    from everest_ds.training.weights import initial_weights  # imports torch, which is slow

    with initial_weights(config, source):
        pass


def _initial_weights(config: Experiment) -> Path | None:
    """Return the weights that a start reads: those of `model.init_from`, unless it resumes."""
    return None if list_checkpoints(config.run.dir / "checkpoints") else config.model.init_from


def check_evaluation_inputs(config: Experiment, planned: bool = False) -> None:
    """Check the files that only validation, test and probes read: their manifests and the class names.

    Args:
        config: config of the run.
        planned: True if the files need not exist yet.

    Raises:
        DataError: if a file does not exist or is invalid.
        ConfigError: if the number of names is not model.num_classes.
    """
    data, num_classes = config.data, config.model.num_classes
    if config.task == "pretrain":
        files = {split: getattr(data, split) for split in splits_of("pretrain", config)}
        for split in PROBE_SPLITS:
            if split in files and not (planned and not files[split].exists()):
                read_data_set(manifest_of(config, split), root=data.root, num_classes=None, labelled=True)
        return
    for split, file in (("val", data.val), ("test", data.test)):
        if file is not None and not (planned and not file.exists()):
            manifest = manifest_of(config, split)
            read_data_set(manifest, root=data.root, num_classes=num_classes, labelled=True)
    if not planned or (data.class_names is not None and data.class_names.is_file()):
        class_names(config)
