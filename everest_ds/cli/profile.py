"""The command `everest-ds profile`, which counts and measures the cost of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from everest_ds.cli.options import JsonFile, Overrides
from everest_ds.console import print_facts, print_table, print_text, write_json
from everest_ds.errors import UsageError

ProfiledModel = Annotated[
    str,
    typer.Argument(
        metavar="SUBJECT",
        help="What to profile: a recipe, a YAML file, a run folder, or a published system such as mvit_b.",
    ),
]
NumRanks = Annotated[
    int,
    typer.Option("--ranks", min=1, help="Number of ranks in the run; the memory shown is that of one rank."),
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Also time training steps on this machine's GPU or CPU, with and without DeepSpeed.",
    ),
]

# Tables of a profile with their titles, in print order.
_TITLES = {
    "compute": "Compute of one clip",
    "by_module": "Compute by module (counted)",
    "by_operator": "Compute by operator (counted)",
    "memory": "Memory of one rank at the peak of a training step",
    "memory_peak_at": "When memory peaks",
}
# Counting runs the model on one rank, so the two memory columns can describe different runs.
_MEMORY_HEADINGS = {
    "predicted_mib": "predicted for this run, MiB",
    "counted_mib": "counted without ZeRO, MiB",
}


def profile(
    subject: ProfiledModel,
    overrides: Overrides = None,
    ranks: NumRanks = 1,
    measure: Measure = False,
    json_file: JsonFile = None,
) -> None:
    """Count the parameters, compute and memory of a model without running it.

    With --measure, also run training steps and report their time and MFU (model FLOPs utilisation).

    Example: everest-ds profile k400_pretrain_vit_base model.backbone=vit_huge --ranks 8
    """
    # The imports are here because they load torch, which the help of this command does not need.
    from everest_ds.efficiency.measure_step import measure_both_steps
    from everest_ds.efficiency.profiles import find_subject, profile_config, profile_system

    config = find_subject(subject, overrides or [])
    if config is None:
        _refuse_settings(subject, overrides or [], ranks, measure)
    found = profile_system(subject) if config is None else profile_config(subject, config, ranks)
    print_facts(f"Profile: {subject}", found.facts)
    for name, title in _TITLES.items():
        rows = found.tables[name]
        headings = _MEMORY_HEADINGS if config and name == "memory" else {}
        print_table(title, [{headings.get(key, key): cell for key, cell in row.items()} for row in rows])
    print_table("Memory over time in a training step (counted)", found.timeline())
    others = [row["operator"] for row in found.tables["not_counted"]]
    print_text(f"{len(others)} operators without MACs are not in the counts; --json FILE lists them")
    engine = plain = None
    if config and measure:
        engine, plain = measure_both_steps(subject, config)
        print_facts("One training step of the engine (measured)", engine.facts())
        print_facts("The same step in a plain loop, without DeepSpeed (measured)", plain.facts())
    write_json(json_file, found.as_json(engine, plain))


def _refuse_settings(subject: str, overrides: Sequence[str], ranks: int, measure: bool) -> None:
    given = [*overrides, *(["--measure"] if measure else [])]
    given += [f"--ranks {ranks}"] if ranks > 1 else []
    if given:
        raise UsageError(
            f"{subject}: settings do not apply to a published system, which is profiled as it was published,"
            " on one rank",
            given=" ".join(given),
            fix="leave these settings out, or profile a recipe",
        )
