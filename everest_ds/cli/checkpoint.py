"""The command `everest-ds checkpoint`, which inspects, verifies, exports and converts checkpoints.

The functions import the library themselves, because it imports torch, which their help does not need.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from everest_ds.checkpoints.names import list_checkpoints
from everest_ds.cli.options import JsonFile
from everest_ds.console import print_facts, print_table, write_json
from everest_ds.errors import CheckpointError, ExitCode
from everest_ds.units import format_bytes

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
    from everest_ds.checkpoints.folder import verify_checkpoint

    rows = []
    for path in list_checkpoints(source / "checkpoints") or [source]:
        problem = "none"
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            problem = str(error)
        rows.append({"checkpoint": str(path), "problem": problem})
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

    path = export_weights(source, file, dtype)
    typer.echo(f"{file}: {format_bytes(file.stat().st_size)} of {dtype} weights from {path}")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="The weights to convert: a run folder, a checkpoint, a .safetensors file, a .pth file of"
            " VideoMAE, EVEREST, MVD or MME, or a folder of transformers' VideoMAE."
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(
            help="Where to write: a .safetensors file for --to everest, a folder for --to transformers, and a"
            " .pth file for the other layouts."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY.PATH=VALUE]...",
            help="Settings that the weights do not show, such as model.num_frames=8 or model.positions=grid.",
        ),
    ] = None,
    to: Annotated[
        Literal["everest", "videomae", "mvd", "mme", "transformers"],
        typer.Option(
            help="Layout to write: everest is the layout of EVEREST-DS; videomae is also that of the released"
            " EVEREST code."
        ),
    ] = "everest",
    entry: Annotated[
        str | None,
        typer.Option(help="Entry of a .pth file that holds the weights to convert, such as model_ema."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Convert weights between layouts, and list every key as used, renamed or unused (with the reason).

    The layout of the source is detected, and the backbone, tubelet size and number of classes follow from the
    tensor shapes. A wrong shape or an unknown key is an error that names the key. Training (with
    `model.init_from`), `features` and `predict` read all these layouts without conversion.

    Example: everest-ds checkpoint convert videomae_vit_b_k400.pth vit_b.safetensors
    """
    from everest_ds.interchange.convert import conversion_facts, convert_weights, key_patterns

    done = convert_weights(source, target, to, overrides or [], entry)
    facts = conversion_facts(done)
    print_table(f"Keys of {source} (n: number of a block)", key_patterns(done.keys))
    print_facts(f"{source} -> {target}", facts)
    for note in done.notes:
        typer.echo(f"note: {note}")
    write_json(json_file, {**facts, "notes": done.notes, "keys": [key._asdict() for key in done.keys]})
