"""The search space of a config: the combinations of the knobs' values that can run, and why others cannot.

No combination changes what is learned: the global batch is kept, and so is the precision unless the device
lacks it or others are asked for. The config's own checks find impossible combinations; none is repeated here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import ValidationError

from everest_ds.config.batch import plan_ranks
from everest_ds.config.mesh_shape import MeshShape, check_searched_degree
from everest_ds.config.schema import Experiment, ParallelismConfig
from everest_ds.errors import ConfigError
from everest_ds.tuning.batches import agrees, check_agreement, clips_per_group
from everest_ds.tuning.cluster import Cluster
from everest_ds.tuning.knobs import DETAIL, FAMILY, VARIANT, Settings, combinations, settings_of, text_of


class Sharding(NamedTuple):
    """A family of candidates: the values of the knobs with that role, such as ZeRO stage and precision."""

    settings: Settings

    @classmethod
    def of(cls, config: Experiment) -> Sharding:
        """Return the family of a config."""
        return cls(settings_of(config, FAMILY))

    def __str__(self) -> str:
        return text_of(FAMILY, self.settings)


class Dropped(NamedTuple):
    """A family without a candidate, and the reason.

    Attributes:
        family: human-readable name, such as `ZeRO-0, bf16`.
        reason: why the family has no candidate.
        shortage_bytes: least shortage of memory; None if the reason is another.
    """

    family: str
    reason: str
    shortage_bytes: int | None = None


def by_reason(shardings: Iterable[tuple[Sharding, str, int | None]]) -> Iterator[Dropped]:
    """Merge shardings with the same reason and shortage: a line each for up to 24 would be too many."""
    reasons: dict[tuple[str, int | None], list[Sharding]] = {}
    for sharding, reason, shortage in shardings:
        reasons.setdefault((reason, shortage), []).append(sharding)
    for (reason, shortage), alike in reasons.items():
        yield Dropped(_together(alike), reason, shortage)


def _together(shardings: Sequence[Sharding]) -> str:
    """Return one name for several shardings, such as `ZeRO-2, 2 offload; tensor 1, 2; bf16`.

    A switch that is on follows the value of the first knob.
    """
    if len(shardings) == 1:
        return str(shardings[0])
    first, *others = FAMILY
    switches = [knob for knob in others if "{}" not in knob.label]
    rows = [dict(zip(FAMILY, one.settings, strict=True)) for one in shardings]
    leading = {"".join([str(row[first]), *(knob.text(row[knob]) for knob in switches)]) for row in rows}
    parts = [first.text(", ".join(sorted(one.replace(",", "") for one in leading)))]
    for knob in others:
        if knob not in switches:
            parts.append(knob.text(", ".join(map(str, sorted({row[knob] for row in rows})))).lstrip(", "))
    return "; ".join(parts)


@dataclass(frozen=True)
class Space:
    """The search space of one config on one cluster.

    Attributes:
        config: the recipe, with its global batch.
        cluster: the ranks of the run.
        free: keys of the knobs that are searched; the others keep the config's values.
    """

    config: Experiment
    cluster: Cluster
    free: Collection[str]

    def shardings(self) -> Iterator[Experiment]:
        """Yield the config in every sharding; `check_sharded` refuses those that cannot run."""
        parallelism = self.config.parallelism.model_copy(update={"offload_to_nvme": None})
        # Knobs that are searched on request only change slowest, which keeps the default families together.
        knobs = sorted(FAMILY, key=lambda knob: knob.searched)
        config = self.config.model_copy(update={"parallelism": parallelism})
        return combinations(knobs, config, self.cluster, self.free)

    def check_sharded(self, sharded: Experiment) -> None:
        """Check that a sharding can run, without the settings of a variant.

        Raises:
            ConfigError: the sharding cannot run on these ranks; the message is the human-readable reason.
        """
        num_ranks = self.cluster.num_ranks
        check_searched_degree(sharded.parallelism.tensor, num_ranks, self.cluster.ranks_per_node)
        try:
            ParallelismConfig.model_validate(sharded.parallelism.model_dump())
        except ValidationError as error:
            raise ConfigError(error.errors()[0]["msg"].removeprefix("Value error, ")) from None
        total = self.config.batch.global_batch_size or 0
        degree = MeshShape.of(sharded, num_ranks).num_shares
        if total % degree or total < degree:
            raise ConfigError(f"{total} clips cannot be split evenly over {degree} data-parallel ranks")
        check_agreement(_plain(sharded))
        if not self.details(sharded):
            share = clips_per_group(sharded, num_ranks)
            raise ConfigError(f"no allowed micro-batch divides the {share} clips of a data-parallel rank")

    def variants(self, sharded: Experiment) -> list[Experiment]:
        """Return the sharded config in every allowed variant, the plain one first if it is allowed."""
        return [one for one in combinations(VARIANT, sharded, self.cluster, self.free) if agrees(one)]

    def details(self, sharded: Experiment) -> list[Settings]:
        """Return the allowed settings of the details, the smallest micro-batch first."""
        found = combinations(DETAIL, _plain(sharded), self.cluster, self.free)
        return [settings_of(one, DETAIL) for one in found if agrees(one) and self._splits(one)]

    def _splits(self, config: Experiment) -> bool:
        try:
            plan_ranks(config, self.cluster.num_ranks)
        except ConfigError:
            return False
        return True


def _plain(config: Experiment) -> Experiment:
    """Return the config in the variant of plain data parallelism."""
    for knob in VARIANT:
        config = knob.chosen(config, knob.plain[0]) if knob.plain else config
    return config
