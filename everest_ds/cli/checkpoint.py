"""The command `everest-ds checkpoint`, which inspects, verifies, exports and converts checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.console import print_facts, print_table, write_json
from everest_ds.errors import CheckpointError, ExitCode

WeightsArg = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT",
        help="A checkpoint folder, or a run folder to use its newest complete checkpoint.",
    ),
]


def inspect(source: WeightsArg, json_file: JsonFile = None) -> None:
    """Print the contents of a checkpoint: step, position in the data, ranks that saved it, and sizes.

    Example: everest-ds checkpoint inspect runs/first
    """
    from everest_ds.checkpoints.folder import find_checkpoint
    from everest_ds.units import format_bytes

    path, manifest = find_checkpoint(source)
    facts = manifest.facts
    print_facts(
        f"Checkpoint {path}",
        {
            "step": facts.step,
            "task": facts.task,
            **facts.position,
            "global_batch_size": facts.global_batch_size,
            "written_by": ", ".join(f"{key} {value}" for key, value in facts.world.items()),
            "parameters": f"{sum(p.numel for p in manifest.parameters.values()):,}"
            f" in {len(manifest.parameters)} tensors",
            "files": f"{len(manifest.files)}, {format_bytes(manifest.num_bytes)}",
            "versions": ", ".join(f"{name} {version}" for name, version in facts.versions.items() if version),
        },
    )
    write_json(json_file, {"checkpoint": str(path), **manifest.model_dump(mode="json")})


def verify(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="A checkpoint folder, or a run folder to verify all its checkpoints."
        ),
    ],
    json_file: JsonFile = None,
) -> None:
    """Read every file of a checkpoint and compare its size and checksum with those recorded at the save.

    The exit code is 4 if a file is missing or damaged.

    Example: everest-ds checkpoint verify runs/first
    """
    from everest_ds.checkpoints.names import list_checkpoints

    paths = list_checkpoints(source / "checkpoints") or [source]
    rows = [{"checkpoint": str(path), "problem": _problem(path)} for path in paths]
    print_table("Checkpoints", rows)
    write_json(json_file, rows)
    if any(row["problem"] != "none" for row in rows):
        raise typer.Exit(ExitCode.CHECKPOINT)


def export(
    source: WeightsArg,
    file: Annotated[Path, typer.Argument(help="Name of the .safetensors file to write.")],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Precision of the weights.")] = "fp32",
) -> None:
    """Write the model weights of a checkpoint to one safetensors file.

    The checkpoint may have been saved by any number of ranks. The weights are copied one tensor at a time, so
    that the full model need not fit into memory.

    Example: everest-ds checkpoint export runs/first encoder.safetensors --dtype bf16
    """
    from everest_ds.checkpoints.export import export_weights
    from everest_ds.units import format_bytes

    path = export_weights(source, file, dtype)
    typer.echo(f"{file}: {format_bytes(file.stat().st_size)} of {dtype} weights from {path}")


def _problem(path: Path) -> str:
    from everest_ds.checkpoints.folder import verify_checkpoint

    try:
        verify_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    return "none"
