"""`everest-ds checkpoint convert`: between our weights and those of VideoMAE, MVD, MME and transformers."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from everest_ds.cli.output import JsonFile, print_facts, print_table, write_json

if TYPE_CHECKING:
    from everest_ds.interchange.convert import Conversion, Key

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A run, a checkpoint, a .safetensors file; a .pth of VideoMAE, EVEREST, MVD or MME; a folder"
            " of transformers' VideoMAE."
        ),
    ],
    target: Annotated[
        Path, typer.Argument(help="A .safetensors file; of the originals a .pth; of transformers a folder.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY.PATH=VALUE]...",
            help="What the source does not tell, such as model.num_frames=8 or model.positions=grid.",
        ),
    ] = None,
    to: Annotated[
        Literal["everest", "videomae", "mvd", "mme", "transformers"],
        typer.Option(help="Whose layout to write; everest is ours, videomae the released EVEREST's too."),
    ] = "everest",
    entry: Annotated[
        str | None,
        typer.Option(help="Part of a training script's file to take, such as model_ema."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Convert weights between layouts and account for every key: used, renamed, or unused and why.

    The source's layout is recognised, and backbone, tubelets and classes follow from the shapes. Wrong shapes
    and unknown keys are refused by name. `model.init_from`, `features` and `predict` read all of these as
    they are.

    Example: everest-ds checkpoint convert videomae_vit_b_k400.pth vit_b.safetensors
    """
    from everest_ds.interchange.convert import convert as run

    done = run(source, target, to, overrides or [], entry)
    counts = Counter(key.status for key in done.keys)
    print_facts(f"{source} -> {target}", describe(done, counts))
    print_table(f"Keys of {source}, n for the number of a block", _by_pattern(done.keys))
    for note in done.notes:
        typer.echo(f"note: {note}")
    keys = [key._asdict() for key in done.keys]
    write_json(json_file, {**describe(done, counts), "notes": done.notes, "keys": keys})


def describe(done: Conversion, counts: Counter[str]) -> dict[str, Any]:
    """What was found, for a table."""
    model, tokens = done.config.model, done.config.tokens
    kept = f", keep_ratio {tokens.keep_ratio:g}" if tokens.selection in ("rero", "random") else ""
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


def _by_pattern(keys: list[Key]) -> list[dict[str, Any]]:
    """One row for the keys that differ in the number of their block only."""
    found = Counter(
        (_NUMBER.sub("n", source), _NUMBER.sub("n", target), status, why)
        for source, target, status, why in keys
    )
    return [
        {"key": source, "count": count, "becomes": target or f"unused: {why}"}
        for (source, target, _, why), count in found.items()
    ]
