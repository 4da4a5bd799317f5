"""The command `everest-ds checkpoint convert`, between our layout and those of other video autoencoders."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from everest_ds.cli.options import JsonFile
from everest_ds.console import print_facts, print_table, write_json

if TYPE_CHECKING:
    from everest_ds.interchange.convert import Conversion, Key

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


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
    from everest_ds.interchange.convert import convert_weights as run

    done = run(source, target, to, overrides or [], entry)
    counts = Counter(key.status for key in done.keys)
    print_facts(f"{source} -> {target}", describe(done, counts))
    print_table(f"Keys of {source} (n: number of a block)", _by_pattern(done.keys))
    for note in done.notes:
        typer.echo(f"note: {note}")
    keys = [key._asdict() for key in done.keys]
    write_json(json_file, {**describe(done, counts), "notes": done.notes, "keys": keys})


def describe(done: Conversion, counts: Counter[str]) -> dict[str, Any]:
    """Return the facts about a conversion as the rows of a table."""
    model, tokens = done.config.model, done.config.tokens
    kept = f", keep_ratio {tokens.keep_ratio:g}" if tokens.rule.keeps_share else ""
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
    """Return one row for each group of keys that differ only in the number of their block."""
    found = Counter(
        (_NUMBER.sub("n", source), _NUMBER.sub("n", target), status, why)
        for source, target, status, why in keys
    )
    return [
        {"key": source, "count": count, "becomes": target or f"unused: {why}"}
        for (source, target, _, why), count in found.items()
    ]
