"""Conversion of weights from any layout to any other, with a report on every key of the source."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from everest_ds.checkpoints.export import config_entry
from everest_ds.checkpoints.tensor_file import TensorSpec, publish_tensors
from everest_ds.config import Experiment
from everest_ds.config.backbones import LAYER_NORM_EPS
from everest_ds.errors import CheckpointError
from everest_ds.interchange.files import CONFIG_FILE, PREPROCESSING_FILE, SAFETENSORS_FILE
from everest_ds.interchange.infer import TRANSFORMERS_LAST_EPS
from everest_ds.interchange.layouts import Layout, layout_of
from everest_ds.interchange.source import WeightSource, open_source
from everest_ds.interchange.tensors import to_theirs
from everest_ds.interchange.transformers_folder import save_folder
from everest_ds.output_paths import refuse_input

_BLOCK_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Key(NamedTuple):
    """Outcome of the conversion for one key of the source.

    Attributes:
        source: name in the source; several names joined by `+` if their tensors become one.
        target: name in the target; several names joined by `+` if one tensor is split; empty if unused.
        status: `used` (under the same name), `renamed` or `unused`.
        why: reason why an unused key is not needed.
    """

    source: str
    target: str
    status: str
    why: str = ""


@dataclass(frozen=True)
class Conversion:
    """Report on a conversion.

    Attributes:
        source: layout that was read, such as `videomae finetune`.
        target: layout that was written.
        config: config of the model.
        assumed: settings that the source does not define, with their assumed values, as `key=value`.
        left_out: entries of the source that are not weights.
        keys: every key of the source, once.
        notes: differences in what the other system computes, and ambiguities of the source layout.
    """

    source: str
    target: str
    config: Experiment
    assumed: list[str]
    left_out: tuple[str, ...]
    keys: list[Key]
    notes: list[str]


def convert_weights(
    path: Path, target: Path, system: str, overrides: Sequence[str] = (), entry: str | None = None
) -> Conversion:
    """Write the weights at `path` in the layout of another system.

    Args:
        path: source of the weights, see `open_source`.
        overrides: `key.path=value` settings, see `open_source`.
        entry: entry of a training checkpoint, see `open_source`.
        target: a `.safetensors` file for `everest`, a `.pth` file for the originals, a folder for
            `transformers`.
        system: one of `layouts.SYSTEMS`.

    Raises:
        CheckpointError: if the source cannot be read, the system computes other positions, or the target
            cannot be written.
        UsageError: if the target would overwrite the source.
        ConfigError: if an override is invalid.
    """
    with open_source(path, overrides, entry) as source:
        layout = layout_of(system, source.layout.kind)
        _check_positions(source, system)
        _check_target(source.path, target)
        try:
            _write(source, layout, target)
        except OSError as error:
            raise CheckpointError(f"{target}: cannot be written", given=error.strerror) from None
        return Conversion(
            f"{source.layout.system} {source.layout.kind}",
            f"{system} {layout.kind}",
            source.config,
            source.assumed,
            source.left_out,
            _account(source, layout),
            _notes(source, system),
        )


def conversion_facts(done: Conversion) -> dict[str, str]:
    """Describe a conversion as the rows of a table."""
    model, tokens = done.config.model, done.config.tokens
    kept = f", keep_ratio {tokens.keep_ratio:g}" if done.config.task in tokens.rule.shares else ""
    counts = Counter(key.status for key in done.keys)
    return {
        "from": done.source,
        "to": done.target,
        "model": f"{model.backbone}" + (f", {model.num_classes} classes" if model.num_classes else ""),
        "clip": f"{model.num_frames} frames of {model.image_size}x{model.image_size},"
        f" tubelets of {model.tubelet_size}x{model.patch_size}x{model.patch_size}",
        "tokens": f"{tokens.selection}{kept}",
        "assumed": ", ".join(done.assumed) or "nothing",
        "left_out": ", ".join(done.left_out) or "nothing",
        "keys": ", ".join(f"{counts[status]} {status}" for status in ("used", "renamed", "unused")),
    }


def key_patterns(keys: Sequence[Key]) -> list[dict[str, Any]]:
    """Return one row for each group of keys that differ only in the number of their block."""
    found = Counter(
        (_BLOCK_NUMBER.sub("n", source), _BLOCK_NUMBER.sub("n", target), why)
        for source, target, _, why in keys
    )
    return [
        {"key": source, "count": count, "becomes": target or f"unused: {why}"}
        for (source, target, why), count in found.items()
    ]


def _write(source: WeightSource, layout: Layout, target: Path) -> None:
    if layout.system == "everest":
        _save_own(source, target)
        return
    state: dict[str, Tensor] = {}
    for name in source.shapes:
        names = layout.theirs(name)
        if names:
            parts = to_theirs(name, source.read(name), len(names), source.config.model.geometry)
            state.update(zip(names, parts, strict=True))
    if layout.system == "transformers":
        save_folder(target, state, layout.kind, source.config, source.class_names)
    else:
        _save_pickle(state, target)


def _check_target(source: Path, target: Path) -> None:
    described = [source, *(source.parent / name for name in (CONFIG_FILE, PREPROCESSING_FILE))]
    inputs = {file.resolve() for file in (source.iterdir() if source.is_dir() else described)}
    for file in (target, *(target / name for name in (SAFETENSORS_FILE, CONFIG_FILE, PREPROCESSING_FILE))):
        refuse_input(file, inputs)


def _save_own(source: WeightSource, file: Path) -> None:
    metadata = config_entry(source.config.model_dump(mode="json"))
    if source.class_names:
        metadata["classes"] = json.dumps(source.class_names)
    specs = {name: TensorSpec(torch.float32, shape) for name, shape in source.shapes.items()}
    publish_tensors(file, specs, map(source.read, source.shapes), metadata)


def _save_pickle(state: dict[str, Tensor], file: Path) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        torch.save({"model": state}, temporary)
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _account(source: WeightSource, layout: Layout) -> list[Key]:
    keys = []
    for name, theirs in source.theirs.items():
        new = layout.theirs(name)
        status = "unused" if not new else "used" if new == theirs else "renamed"
        why = "" if new else f"the {layout.system} layout has no such key"
        keys.append(Key(" + ".join(theirs), " + ".join(new), status, why))
    return keys + [Key(key, "", "unused", why) for key, why in source.unused]


def _check_positions(source: WeightSource, system: str) -> None:
    positions, theirs = source.config.model.positions, "grid" if system == "mvd" else "flat"
    if system != "everest" and positions != theirs:
        raise CheckpointError(
            f"{source.path}: {system} uses other fixed positions than this model",
            given=f"model.positions={positions}",
            allowed=f"model.positions={theirs}",
            fix="convert it to everest, which supports both",
        )
    if system != "everest" and source.config.model.positions_from is not None:
        raise CheckpointError(
            f"{source.path}: {system} cannot compute the interpolated positions of this model",
            given=f"model.positions_from={source.config.model.positions_from}",
            fix="convert it to everest, which can",
        )


def _notes(source: WeightSource, system: str) -> list[str]:
    model, tokens, notes = source.config.model, source.config.tokens, []
    if (source.layout.system, source.layout.kind) == ("videomae", "finetune") and model.positions == "flat":
        notes.append(
            "VideoMAE, EVEREST, MME and MVD give fine-tuned weights the same names, but MVD uses other"
            " positions: for weights from MVD, give model.positions=grid"
        )
    last = TRANSFORMERS_LAST_EPS if system == "transformers" else LAYER_NORM_EPS
    if system != "everest" and source.layout.kind != "encoder" and model.last_norm_eps != last:
        notes.append(
            f"the last LayerNorm has epsilon {last:g} in {system} and {model.last_norm_eps:g} in this model:"
            " outputs differ by about 1e-5 of their size"
        )
    if system not in ("everest", "transformers") and model.norm_eps != LAYER_NORM_EPS:
        notes.append(
            f"LayerNorms have epsilon {LAYER_NORM_EPS:g} in {system} and {model.norm_eps:g} in this model"
        )
    if system != "everest" and source.config.task in tokens.rule.shares and tokens.keep_ratio < 1:
        notes.append(
            f"this model keeps {tokens.keep_ratio:g} of the tokens ({tokens.selection}), which the written"
            " weights do not record"
        )
    return notes
