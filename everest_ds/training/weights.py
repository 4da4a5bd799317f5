"""Finding weights in a run folder and putting them into a model."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from everest_ds.checkpoints.export import load_weights
from everest_ds.checkpoints.folder import find_checkpoint
from everest_ds.errors import CheckpointError
from everest_ds.training.run_folder import RunFolder

ENCODER = "encoder."


def find_weights(source: Path, prefer_best: bool = False) -> Path:
    """What `load_weights` reads for a path: a file, or a run folder's newest checkpoint (or best weights).

    Raises:
        CheckpointError: if there is none.
    """
    best = RunFolder(source).best_weights
    if source.is_file() or (prefer_best and best.is_file()):
        return source if source.is_file() else best
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: no weights there", allowed="a run folder, a checkpoint, or a .safetensors file"
        )
    return find_checkpoint(source)[0]


def load_encoder(model: nn.Module, source: Path) -> Path:
    """Start the encoder of `model` from a pre-training run; the rest stays as it is. Returns what was read.

    Raises:
        CheckpointError: if the encoder there has another architecture.
    """
    file = find_weights(source)
    tensors, _ = load_weights(file)
    load_tensors(model, {k: v for k, v in tensors.items() if k.startswith(ENCODER)}, file, prefix=ENCODER)
    return file


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], file: Path, prefix: str = "") -> None:
    """Copy `tensors` into all parameters of `model` that start with `prefix`.

    Raises:
        CheckpointError: naming the first parameter that is missing, unexpected or of another shape.
    """
    wanted = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
    for name in [*wanted, *tensors]:
        here, there = wanted.get(name), tensors.get(name)
        if here is None or there is None or here.shape != there.shape:
            raise CheckpointError(
                f"{file}: weights of another architecture, at `{name}`",
                given="absent" if there is None else f"shape {tuple(there.shape)}",
                allowed="absent" if here is None else f"shape {tuple(here.shape)}",
                fix="use the model section of the run that wrote it",
            )
    model.load_state_dict(tensors, strict=False)
