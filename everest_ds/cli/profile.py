"""The command `everest-ds profile`, which counts and measures the cost of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everest_ds import __version__
from everest_ds.cli.options import JsonFile, Overrides
from everest_ds.console import print_facts, print_table, write_json
from everest_ds.efficiency.measure_step import measure_both_steps
from everest_ds.errors import ConfigError, UsageError, nearest
from everest_ds.units import format_bytes

if TYPE_CHECKING:
    from everest_ds.config import Experiment
    from everest_ds.efficiency.measured import Measured
    from everest_ds.profiling.compute_tables import Table

Subject = Annotated[
    str,
    typer.Argument(
        metavar="SUBJECT",
        help="What to profile: a recipe, a YAML file, a run folder, or a published system such as mvit_b.",
    ),
]
Ranks = Annotated[
    int, typer.Option(min=1, help="Number of ranks in the run; the memory shown is that of one rank.")
]
Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Also time training steps on this machine's GPU or CPU, with and without DeepSpeed.",
    ),
]

# Tables of a profile with their titles, in print order.
TITLES = {
    "compute": "Compute of one clip",
    "by_module": "Compute by module (counted)",
    "by_operator": "Compute by operator (counted)",
    "not_counted": "Operators without MACs, which are not in the counts",
    "memory": "Memory of one rank at the peak of a training step (counted for one rank without ZeRO)",
    "memory_peak_at": "When memory peaks",
}

_BARS, _WIDTH = " ▁▂▃▄▅▆▇█", 48


def profile(
    subject: Subject,
    overrides: Overrides = None,
    ranks: Ranks = 1,
    measure: Measure = False,
    json_file: JsonFile = None,
) -> None:
    """Count the parameters, compute and memory of a model without running it.

    With --measure, also run training steps and report their time and MFU (model FLOPs utilization).

    Example: everest-ds profile k400_pretrain_vit_base model.backbone=vit_huge --ranks 8
    """
    config = _resolve(subject, overrides or [])
    if config is None:
        _refuse_settings(subject, overrides or [], ranks, measure)
        facts, tables = _system_facts(subject), _profile_system(subject)
    else:
        facts, tables = (
            _facts(config, ranks),
            _profile_config(config, ranks),
        )
    print_facts(f"Profile: {subject}", facts)
    for name, title in TITLES.items():
        print_table(title, tables[name])
    print_table("Memory over time in a training step (counted)", _shapes(tables["memory_over_time"]))
    measured = plain = None
    if config and measure:
        measured, plain = measure_both_steps(subject, config)
        print_facts("One training step of the engine (measured)", measured.facts())
        print_facts("The same step in a plain loop, without DeepSpeed (measured)", plain.facts())
    write_json(json_file, _as_json(subject, config, tables, measured, plain))


def _resolve(subject: str, overrides: Sequence[str]) -> Experiment | None:
    """Return the config of a recipe, file or run folder, or None if the subject is a published system."""
    from everest_ds.config import find_config, load_experiment, recipe_names

    try:
        find_config(subject)
    except ConfigError:
        from everest_ds.efficiency.peer_counts import peer_names

        if subject in peer_names():
            return None
        raise UsageError(
            "no such recipe, YAML file, run folder or published system",
            given=repr(subject),
            allowed=nearest(subject, [*recipe_names(), *peer_names()]),
        ) from None
    return load_experiment(subject, overrides)


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


def _profile_system(name: str) -> dict[str, Table]:
    from everest_ds.efficiency.peer_counts import find_peer
    from everest_ds.efficiency.peer_profile import memory_of_peer, profile_peer

    peer = find_peer(name)
    return {**profile_peer(peer), **memory_of_peer(peer)}


def _profile_config(config: Experiment, ranks: int) -> dict[str, Table]:
    from everest_ds.parallel.recompute import apply_recompute
    from everest_ds.profiling.compute_tables import profile_experiment
    from everest_ds.profiling.memory_tables import memory_of_experiment

    def recompute(model: Any) -> None:
        apply_recompute(model, config.recompute)

    memory = memory_of_experiment(config, ranks, recompute)
    return {**profile_experiment(config), **memory}


def _shapes(timeline: Table) -> Table:
    """Draw the memory of each phase as a line of bars, scaled to the peak of the step."""
    totals = [(row["phase"], sum(v for v in row.values() if isinstance(v, int))) for row in timeline]
    peak = max(total for _, total in totals)
    phases: dict[str, list[int]] = {}
    for phase, total in totals:
        phases.setdefault(phase, []).append(total)
    return [
        {
            "phase": phase,
            "live_memory": "".join(_BARS[(len(_BARS) - 1) * total // peak] for total in _thinned(sizes)),
            "highest": format_bytes(max(sizes)),
        }
        for phase, sizes in phases.items()
    ]


def _thinned(sizes: Sequence[int]) -> list[int]:
    """Reduce a series to at most `_WIDTH` values, each the maximum of several neighbours."""
    few = -(-len(sizes) // _WIDTH)
    return [max(sizes[first : first + few]) for first in range(0, len(sizes), few)]


def _system_facts(name: str) -> dict[str, Any]:
    from everest_ds.efficiency.peer_counts import find_peer

    peer = find_peer(name)
    frames, height, width, _ = peer.clip_shape
    return {
        "model": f"{name} at its published size, {peer.phase}",
        "clip": f"one view of {frames} frames of {height}x{width}; the published figure is for {peer.views}"
        f" view{'' if peer.views == 1 else 's'}",
        "memory_of": "a training step on one clip, fp32",
    }


def _facts(config: Experiment, ranks: int) -> dict[str, Any]:
    counts, model, parallelism = config.token_counts, config.model, config.parallelism
    split = f", tensor parallel {parallelism.tensor}" if parallelism.tensor > 1 else ""
    return {
        "model": f"{model.backbone}, {config.task}, {config.tokens.selection}",
        "clip": f"{model.num_frames} frames of {model.image_size}x{model.image_size}",
        "tokens": f"{counts.num_tokens} in all, {counts.num_kept} kept, {counts.num_visible} in the encoder",
        "memory_of": f"{config.batch.micro_batch_size} clips per rank, {config.precision},"
        f" ZeRO-{parallelism.zero_stage} on {ranks} rank{'s' if ranks > 1 else ''}{split},"
        f" recompute {config.recompute.mode}, {model.attention} attention",
    }


def _as_json(
    subject: str,
    config: Experiment | None,
    tables: Mapping[str, Any],
    measured: Measured | None,
    plain: Measured | None,
) -> dict[str, Any]:
    from everest_ds.efficiency.measured import FORMAT

    return {
        "format": FORMAT,
        "everest_ds": __version__,
        "subject": subject,
        "config": config and config.model_dump(mode="json"),
        **tables,
        "measured": measured and measured.as_json(),
        "plain_loop": plain and plain.as_json(),
    }
