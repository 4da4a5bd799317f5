"""The profile of one model as facts and tables: of a run config, or of a published system."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from everest_ds import __version__
from everest_ds.config import Experiment, find_config, load_experiment, recipe_names
from everest_ds.efficiency.measured import PROFILE_FORMAT, Measured
from everest_ds.efficiency.peer_counts import find_peer, peer_names
from everest_ds.efficiency.peer_profile import memory_of_peer, profile_peer
from everest_ds.errors import ConfigError, UsageError, nearest
from everest_ds.parallel.recompute import apply_recompute
from everest_ds.profiling.compute_tables import Table, profile_experiment
from everest_ds.profiling.memory_tables import memory_of_experiment, timeline_bars


@dataclass(frozen=True)
class Profile:
    """The compute and memory of one model.

    Attributes:
        subject: name of the model.
        config: config of the model; None for a published system.
        facts: the model and the conditions that the figures hold for.
        tables: tables by name; see `profile_experiment` and `memory_of_experiment`.
    """

    subject: str
    config: Experiment | None
    facts: dict[str, str]
    tables: dict[str, Table]

    def timeline(self) -> Table:
        """Draw the memory of each phase of a training step as a line of bars."""
        return timeline_bars(self.tables["memory_over_time"])

    def as_json(self, engine: Measured | None, plain: Measured | None) -> dict[str, Any]:
        """Return the contents of the JSON file that `read_measured` reads.

        Args:
            engine: measurement of the DeepSpeed engine's step; None if it was not measured.
            plain: measurement of the plain loop's step; None if it was not measured.
        """
        return {
            "format": PROFILE_FORMAT,
            "everest_ds": __version__,
            "subject": self.subject,
            "config": self.config and self.config.model_dump(mode="json"),
            **self.tables,
            "measured": engine and engine.as_json(),
            "plain_loop": plain and plain.as_json(),
        }


def find_subject(name: str, overrides: Sequence[str]) -> Experiment | None:
    """Return the config of a recipe, file or run folder, or None if `name` is a published system.

    Raises:
        UsageError: if there is nothing of this name.
        ConfigError: if the config cannot be loaded.
    """
    try:
        find_config(name)
    except ConfigError:
        if name in peer_names():
            return None
        raise UsageError(
            "no such recipe, YAML file, run folder or published system",
            given=repr(name),
            allowed=nearest(name, [*recipe_names(), *peer_names()]),
        ) from None
    return load_experiment(name, overrides)


def profile_config(subject: str, config: Experiment, num_ranks: int) -> Profile:
    """Predict and count the compute and memory of a run config's model on one of `num_ranks` ranks."""

    def recompute(model: nn.Module) -> None:
        apply_recompute(model, config.recompute)

    memory = memory_of_experiment(config, num_ranks, recompute)
    tables = {**profile_experiment(config), **memory}
    return Profile(subject, config, _config_facts(config, num_ranks), tables)


def profile_system(name: str) -> Profile:
    """Count the compute and memory of a published system (one of `peer_names()`) at its published size."""
    peer = find_peer(name)
    frames, height, width, _ = peer.clip_shape
    facts = {
        "model": f"{name} at its published size, {peer.phase}",
        "clip": f"one view of {frames} frames of {height}x{width}; the published figure is for {peer.views}"
        f" view{'' if peer.views == 1 else 's'}",
        "memory_of": "a training step on one clip, fp32",
    }
    return Profile(name, None, facts, {**profile_peer(peer), **memory_of_peer(peer)})


def _config_facts(config: Experiment, num_ranks: int) -> dict[str, str]:
    counts, model, parallelism = config.token_counts, config.model, config.parallelism
    split = f", tensor parallel {parallelism.tensor}" if parallelism.tensor > 1 else ""
    return {
        "model": f"{model.backbone}, {config.task}, {config.tokens.selection}",
        "clip": f"{model.num_frames} frames of {model.image_size}x{model.image_size}",
        "tokens": f"{counts.num_tokens} in all, {counts.num_kept} kept, {counts.num_visible} in the encoder",
        "memory_of": f"{config.batch.micro_batch_size} clips per rank, {config.precision},"
        f" ZeRO-{parallelism.zero_stage} on {num_ranks} rank{'s' if num_ranks > 1 else ''}{split},"
        f" recompute {config.recompute.mode}, {model.attention} attention",
    }
