"""Writer of small checkpoints for tests, without a model or ranks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from everest_ds.checkpoints.folder import commit, start_saving
from everest_ds.checkpoints.reader import entry
from everest_ds.checkpoints.sealed_manifest import STATES, Facts, Manifest, Parameter, Piece
from everest_ds.checkpoints.tensor_file import FileSeal, TensorSpec, write_tensors

SHAPES = {"encoder.weight": (3, 5), "encoder.bias": (7,), "scale": ()}


def states_of(name: str) -> dict[str, Tensor]:
    """Return reproducible values for the weight and moments of a parameter."""
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(len(name))
    return {state: torch.randn(shape, generator=generator) for state in STATES}


def facts(step: int) -> Facts:
    return Facts(
        step=step,
        task="pretrain",
        global_batch_size=8,
        position={"epoch": 0, "step_of_epoch": step, "clips_seen": 8 * step},
        world={"ranks": 2, "zero_stage": 1, "precision": "fp32"},
        optimizer_step=step,
        loss_scale=None,
        schedule={"total_steps": 9},
        random={"seed": 0},
        config={},
        versions={"torch": "2"},
    )


def write_part(saving: Path, file: str, cuts: dict[str, tuple[int, int]]) -> FileSeal:
    """Write the file of one rank, with the elements `start` .. `stop` of each parameter in `cuts`."""
    entries = {entry(s, n): states_of(n)[s].reshape(-1)[slice(*cuts[n])] for s in STATES for n in cuts}
    specs = {key: TensorSpec(torch.float32, tuple(tensor.shape)) for key, tensor in entries.items()}
    return write_tensors(saving / file, specs, entries.values(), {})


def make_checkpoint(folder: Path, step: int) -> Path:
    """Write a complete checkpoint of two ranks, between which the matrix and the vector are split."""
    saving = start_saving(folder, step)
    first = {"encoder.weight": (0, 8), "encoder.bias": (0, 1), "scale": (0, 1)}
    second = {"encoder.weight": (8, 15), "encoder.bias": (1, 7)}
    files = {
        f: write_part(saving, f, cuts) for f, cuts in (("a.safetensors", first), ("b.safetensors", second))
    }
    parameters = {
        name: Parameter(
            shape=shape,
            pieces=tuple(
                Piece(file, 0, cuts[name][0], cuts[name][1] - cuts[name][0])
                for file, cuts in (("a.safetensors", first), ("b.safetensors", second))
                if name in cuts
            ),
        )
        for name, shape in SHAPES.items()
    }
    return commit(saving, Manifest(facts=facts(step), files=files, parameters=parameters))


def forge_manifest(path: Path, change: Callable[[dict], object]) -> None:
    """Change the manifest of a checkpoint, and seal it again."""
    tree = json.loads((path / "manifest.json").read_text())
    change(tree)
    text = json.dumps(tree)
    (path / "manifest.json").write_text(text)
    (path / "manifest.sha256").write_text(f"{hashlib.sha256(text.encode()).hexdigest()}  manifest.json\n")
