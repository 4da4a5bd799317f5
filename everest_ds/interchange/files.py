"""Reading of weights of any system from a file or folder: tensors by name, and descriptions of the model.

No code in a file can run: pickles are read with torch's `weights_only` option, which is extended by a few
harmless types that the original training scripts save next to the weights.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everest_ds.checkpoints.export import find_weights, open_weights
from everest_ds.checkpoints.sealed_manifest import read_checkpoint_manifest
from everest_ds.checkpoints.tensor_file import open_tensors
from everest_ds.config import load_experiment
from everest_ds.errors import CheckpointError
from everest_ds.interchange.layouts import TRANSFORMERS_RENAMED
from everest_ds.interchange.tensors import TensorShape

# Entries of a saved dictionary under which training scripts and DeepSpeed store the weights.
WEIGHT_KEYS = ("model", "module", "model_state", "model_state_dict", "state_dict")
_WRAPPERS = ("module.", "_orig_mod.", "backbone.", "model.")
_DEEPSPEED_FILE = "mp_rank_00_model_states.pt"
CONFIG_FILE, PREPROCESSING_FILE = "config.json", "preprocessor_config.json"
SAFETENSORS_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
_PICKLE_FILE = "pytorch_model.bin"


@dataclass(frozen=True)
class RawWeights:
    """Weights under the names that their file gives them, and the descriptions stored with them.

    Attributes:
        path: file or folder that is read; for a run, one of its checkpoints or its best weights.
        shapes: shape of each tensor, by name.
        read: function that reads the tensor of a name, as float32.
        metadata: metadata of a safetensors file.
        arguments: arguments of the original training script, if they were saved with the weights.
        transformers: content of config.json in a transformers folder.
        preprocessing: content of preprocessor_config.json in a transformers folder.
        left_out: entries of the file that are not weights.
    """

    path: Path
    shapes: dict[str, TensorShape]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    transformers: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()


@contextmanager
def open_raw(path: Path, entry: str | None = None, prefer_best: bool = True) -> Iterator[RawWeights]:
    """Open a file of weights, a run or checkpoint, or a folder of transformers or DeepSpeed.

    Args:
        path: file or folder to open.
        entry: entry of a training checkpoint to read, such as `model_ema`; None reads the usual weights.
        prefer_best: for a run, read the weights of its best validation, if saved, else its newest checkpoint.

    Raises:
        CheckpointError: if `path` holds no readable weights.
    """
    if (path / _DEEPSPEED_FILE).is_file():
        path = path / _DEEPSPEED_FILE
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        with _open_own(path, prefer_best) as raw:
            yield raw
        return
    with ExitStack() as stack:
        raw = _with_older_names(_open_files(_files(path), entry, stack))
        if raw.path.suffix == ".safetensors" or path.is_dir():
            beside = raw.path.parent
            raw = replace(
                raw,
                transformers=_read_json(beside / CONFIG_FILE),
                preprocessing=_read_json(beside / PREPROCESSING_FILE),
            )
        yield replace(raw, read=_only_numbers(raw))


@contextmanager
def _open_own(path: Path, prefer_best: bool) -> Iterator[RawWeights]:
    """Open a checkpoint, or the best weights or newest checkpoint of a run."""
    found = find_weights(path, prefer_best)
    config = read_checkpoint_manifest(found).facts.config if found.is_dir() else _config_beside(found)
    with open_weights(found) as stored:
        metadata = {"config": json.dumps(config)} if config else {}
        raw = RawWeights(found, stored.shapes, stored.read, metadata)
        yield replace(raw, read=_only_numbers(raw))


def _config_beside(file: Path) -> dict[str, Any]:
    """Return the config of the run whose folder holds `file`, or an empty one outside a run folder."""
    beside = file.parent / "config.yaml"
    return load_experiment(beside).model_dump(mode="json") if beside.is_file() else {}


def _files(path: Path) -> list[Path]:
    """Return the weight files of a transformers folder, or `path` itself if it is a file."""
    if not path.is_dir():
        return [path]
    if (path / _INDEX_FILE).is_file():
        return _files_of_index(path / _INDEX_FILE)
    for name in (SAFETENSORS_FILE, _PICKLE_FILE):
        if (path / name).is_file():
            return [path / name]
    raise CheckpointError(
        f"{path}: holds no weights",
        allowed=f"a run, a checkpoint, or a transformers folder with {SAFETENSORS_FILE}",
    )


def _files_of_index(index: Path) -> list[Path]:
    """Return the files that an index names, all of them in its own folder.

    Raises:
        CheckpointError: if the index is malformed, or names a file elsewhere.
    """
    places = _read_json(index).get("weight_map")
    names = list(places.values()) if isinstance(places, dict) else []
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if not names or strange:
        raise CheckpointError(
            f"{index}: not an index of weights",
            given=repr(strange[0]) if strange else "no weight_map",
            allowed='"weight_map": {tensor: name of a file in the same folder}',
        )
    return [index.parent / name for name in dict.fromkeys(names)]


def _only_numbers(raw: RawWeights) -> Callable[[str], Tensor]:
    """Return `raw.read` with a check of every tensor that is read.

    Weights that are not numbers would only show in predictions, or as a loss that diverges.
    """

    def read(name: str) -> Tensor:
        tensor = raw.read(name)
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{raw.path}: `{name}` holds values that are not finite numbers",
                given=f"{int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} infinite values"
                f" of {tensor.numel()}",
                fix="use weights from before the training diverged",
            )
        return tensor

    return read


def _open_files(files: list[Path], entry: str | None, stack: ExitStack) -> RawWeights:
    if files[0].suffix != ".safetensors":
        return _open_pickle(files[0], entry)
    shapes: dict[str, TensorShape] = {}
    of: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for file in files:
        opened = stack.enter_context(open_tensors(file))
        metadata |= opened.metadata() or {}
        for name in opened.keys():
            shapes[name] = tuple(opened.get_slice(name).get_shape())
            of[name] = opened
    if "config" not in metadata and (config := _config_beside(files[0])):
        metadata["config"] = json.dumps(config)
    theirs = _unwrapped(shapes)
    return RawWeights(
        files[0],
        {name: shapes[wrapped] for name, wrapped in theirs.items()},
        lambda name: of[theirs[name]].get_tensor(theirs[name]).float(),
        metadata,
    )


def _open_pickle(file: Path, entry: str | None) -> RawWeights:
    content = _load_pickle(file)
    state, left_out = _find_weights(file, content, entry)
    arguments = content.get("args")
    theirs = _unwrapped([name for name, value in state.items() if isinstance(value, Tensor)])
    return RawWeights(
        file,
        {name: tuple(state[wrapped].shape) for name, wrapped in theirs.items()},
        lambda name: state[theirs[name]].float(),
        arguments=vars(arguments) if isinstance(arguments, argparse.Namespace) else {},
        left_out=left_out,
    )


def _load_pickle(file: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{file}: refused, because it holds objects other than weights",
            given=refused[1] if refused else "not a PyTorch file",
            allowed="tensors, numbers and argparse.Namespace",
            fix="ask its author for a file of weights only: torch.save(checkpoint['model'], file)",
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: not a readable PyTorch file", given=_first_line(error)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a dictionary of weights", given=type(content).__name__)
    return content


def _harmless() -> list[Any]:
    """Return the types, besides tensors, that a pickle may hold.

    Training scripts save learning rates as NumPy scalars, whose constructor differs between NumPy versions.
    """
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")}
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    return [argparse.Namespace, np.dtype, *kinds, *names]


def _find_weights(
    file: Path, content: dict[str, Any], entry: str | None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    wanted = WEIGHT_KEYS if entry is None else (entry,)
    for key in wanted:
        if isinstance(content.get(key), dict):
            return content[key], tuple(name for name in content if name != key)
    if entry is None and any(isinstance(value, Tensor) for value in content.values()):
        return content, ()
    raise CheckpointError(
        f"{file}: holds no weights under {' or '.join(wanted)}",
        given=f"entries {', '.join(map(str, content)) or '(none)'}",
    )


def _unwrapped(names: Collection[str]) -> dict[str, str]:
    """Map names without the prefixes that DistributedDataParallel and other wrappers add to all of them."""
    theirs = {name: name for name in names}
    while prefix := next((one for one in _WRAPPERS if theirs and all(n.startswith(one) for n in theirs)), ""):
        theirs = {name.removeprefix(prefix): wrapped for name, wrapped in theirs.items()}
    return theirs


def _with_older_names(raw: RawWeights) -> RawWeights:
    """Undo the renaming of two biases in state dicts of transformers 5, so that names match its files."""
    names = {}
    for name in raw.shapes:
        ending = next((ending for ending in TRANSFORMERS_RENAMED if name.endswith(ending)), "")
        names[name.removesuffix(ending) + TRANSFORMERS_RENAMED.get(ending, "")] = name
    shapes = {older: raw.shapes[name] for older, name in names.items()}
    return replace(raw, shapes=shapes, read=lambda older: raw.read(names[older]))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON", given=_first_line(error)) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object", given=type(content).__name__)
    return content


@contextmanager
def malformed_as_error(path: Path) -> Iterator[None]:
    """Raise a CheckpointError if the block meets an entry of another kind than it expects in a description.

    The descriptions beside weights (metadata, config.json, arguments of a script) were written by others,
    and may hold anything.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: the description of its model is malformed",
            given=f"{type(error).__name__}: {_first_line(error)}",
            allowed="a description as its system writes it",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
