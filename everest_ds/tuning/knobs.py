"""The searched keys of the config, one row each. Search, tables, explanations and trials read these rows.

A new knob is a row here, and the term of the cost model (costs/) that changes with its key.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal, get_args

from everest_ds.config.mesh_shape import TENSOR_DEGREES
from everest_ds.config.schema import Experiment, ParallelismConfig, RecomputeConfig
from everest_ds.costs.term import TermGroup
from everest_ds.tuning.batches import clips_per_group
from everest_ds.tuning.cluster import Cluster

Role = Literal["family", "variant", "detail"]
Settings = tuple[Any, ...]  # the values of several knobs, in the order of their rows

_STAGES = get_args(ParallelismConfig.model_fields["zero_stage"].annotation)
_MODES = get_args(RecomputeConfig.model_fields["mode"].annotation)
_OFFLOADING_STAGES = (2, 3)  # stages whose offload has a shipped DeepSpeed file
_EVERY = (2, 3, 4)
_BUCKETS = (5_000_000, 50_000_000, 200_000_000)


@dataclass(frozen=True, eq=False)
class Knob:
    """A searched key of the config.

    Attributes:
        key: dotted name of the key.
        role: `family`: candidates with the same value are refused, or left out, together. `variant`: each
            value has a row of its own in the table of candidates. `detail`: only the fastest value is shown.
        column: column of the tables that shows the value, together with those of other keys.
        label: text of a value in its column, with `{}` for the value; a switch has none and is shown if on.
        values: returns the values to try, given the config with the values of the rows above, and the
            cluster.
        terms: groups of cost terms that the key changes. Candidates that agree in all keys of `compute` and
            `recompute` share one prediction of their passes, in time and in memory.
        plain: values in plain data parallelism, which shards, offloads and recomputes nothing, the best one
            first; tables show them only at the start of a column. Empty if plain data parallelism leaves
            the value open.
        faster: value -> values that need less time for the same step, so that a micro-batch that fits with
            one of them is not tried with the value.
        trait: name of the property by which trials correct the predictions; "" if they do not.
        scales: whether `--what-if` compares the values over numbers of GPUs.
        reason: why a value is slower than another, with `{}` for the value; "" leaves it to the cost term.
        searched: whether the key is searched by default.
        applies: tells whether the value has an effect under a config.
    """

    key: str
    role: Role
    column: str
    label: str
    values: Callable[[Experiment, Cluster], Sequence[Any]]
    terms: tuple[TermGroup, ...]
    plain: tuple[Any, ...] = ()
    faster: Mapping[Any, Sequence[Any]] = field(default_factory=dict)
    trait: str = ""
    scales: bool = False
    reason: str = ""
    searched: bool = True
    applies: Callable[[Experiment], bool] = lambda config: True

    def of(self, config: Experiment) -> Any:
        """Return the value in a config; None if it has no effect."""
        value: Any = config
        for name in self.key.split("."):
            value = getattr(value, name)
        return value if self.applies(config) else None

    def chosen(self, config: Experiment, value: Any) -> Experiment:
        """Return the config with another value, unchecked."""
        section, _, leaf = self.key.rpartition(".")
        if not section:
            return config.model_copy(update={leaf: value})
        changed = getattr(config, section).model_copy(update={leaf: value})
        return config.model_copy(update={section: changed})

    def text(self, value: Any) -> str:
        """Return the text of a value in its column; a switch that is off has none."""
        return self.label.format(value) if value or "{}" in self.label else ""


def _host_states(config: Experiment, cluster: Cluster) -> Sequence[bool]:
    """Return the values to try for state offload: on a GPU with a shipped DeepSpeed file, also True."""
    own, has_host = config.parallelism, cluster.machine.asynchronous
    shipped = own.ds_config is None and own.zero_stage in _OFFLOADING_STAGES
    return (False, True) if has_host and shipped else (False,)


def _micro_batches(config: Experiment, cluster: Cluster) -> Sequence[int]:
    """Return the divisors of the clips per data-parallel rank and step, ascending."""
    share, given = clips_per_group(config, cluster.num_ranks), config.batch.grad_accum_steps
    return [m for m in range(1, share + 1) if share % m == 0 and given in (None, share // m)]


ZERO_STAGE = Knob(
    key="parallelism.zero_stage",
    role="family",
    column="sharding",
    label="ZeRO-{}",
    # A DeepSpeed file of the user's own fixes the stage.
    values=lambda config, cluster: (
        _STAGES if config.parallelism.ds_config is None else (config.parallelism.zero_stage,)
    ),
    terms=("communication", "optimizer"),
    plain=(0, 1),
    trait="ZeRO stage",
    scales=True,
)
PRECISION = Knob(
    key="precision",
    role="family",
    column="sharding",
    label=", {}",
    values=lambda config, cluster: cluster.machine.precisions,
    terms=("compute",),
    trait="precision",
    reason="matrix products in {} are slower",
    searched=False,
)
KNOBS = (
    ZERO_STAGE,
    Knob(
        key="parallelism.tensor",
        role="family",
        column="sharding",
        label=", tensor {}",
        values=lambda config, cluster: TENSOR_DEGREES,
        terms=("compute", "communication"),
        plain=(1,),
        trait="tensor degree",
        scales=True,
    ),
    Knob(
        key="recompute.mode",
        role="variant",
        column="recompute",
        label="{}",
        values=lambda config, cluster: _MODES,
        terms=("recompute",),
        plain=("none",),
        faster={"gelu": ("none",), **dict.fromkeys(_MODES[2:], ("none", "gelu"))},
        trait="recompute",
        scales=True,
    ),
    Knob(
        key="recompute.every",
        role="variant",
        column="recompute",
        label="/{}",
        values=lambda config, cluster: [n for n in _EVERY if n <= config.model.shape.encoder.depth],
        terms=("recompute",),
        applies=lambda config: config.recompute.mode == "blocks",
    ),
    Knob(
        key="recompute.offload_to_cpu",
        role="variant",
        column="recompute",
        label=" + offload",
        values=lambda config, cluster: (False, True) if cluster.machine.asynchronous else (False,),
        terms=("recompute", "offload"),
        plain=(False,),
        faster={True: (False,)},
        trait="offload",
    ),
    Knob(
        key="recompute.partition",
        role="variant",
        column="recompute",
        label=" + partition",
        values=lambda config, cluster: (False, True),
        terms=("recompute", "communication"),
        plain=(False,),
        faster={True: (False,)},
    ),
    Knob(
        key="parallelism.offload_to_cpu",
        role="family",
        column="sharding",
        label=", offload",
        values=_host_states,
        terms=("offload", "optimizer"),
        plain=(False,),
        faster={True: (False,)},
        trait="offload",
    ),
    PRECISION,
    # Accumulation follows from the micro-batch, unless it is given; tables add it to the micro-batch.
    Knob(
        key="batch.grad_accum_steps",
        role="detail",
        column="micro_x_accum",
        label="",
        values=lambda config, cluster: (None,),
        terms=("optimizer", "communication"),
    ),
    Knob(
        key="batch.micro_batch_size",
        role="detail",
        column="micro_x_accum",
        label="{}",
        values=_micro_batches,
        terms=("compute", "communication", "overhead"),
        trait="micro-batch",
    ),
)  # in the order of their labels and of the traits that trials compare

SEARCHED = frozenset(knob.key for knob in KNOBS)
TRAITS = tuple(dict.fromkeys(knob.trait for knob in KNOBS if knob.trait))
SCALING_TRAITS = tuple(knob.trait for knob in KNOBS if knob.scales)
FAMILY, VARIANT, DETAIL = (tuple(knob for knob in KNOBS if knob.role == role) for role in get_args(Role))
_IN_PASSES = tuple(knob for knob in KNOBS if {"compute", "recompute"} & set(knob.terms))


def settings_of(config: Experiment, knobs: Sequence[Knob]) -> Settings:
    """Return the values of some knobs in a config."""
    return tuple(knob.of(config) for knob in knobs)


def pass_settings(config: Experiment) -> Settings:
    """Return the values on which the forward and backward passes of a rank depend."""
    return settings_of(config, _IN_PASSES)


def with_settings(config: Experiment, knobs: Sequence[Knob], settings: Settings) -> Experiment:
    """Return the config with other values of some knobs, unchecked."""
    for knob, value in zip(knobs, settings, strict=True):
        config = knob.chosen(config, value)
    return config


def combinations(
    knobs: Sequence[Knob], config: Experiment, cluster: Cluster, free: Collection[str]
) -> Iterator[Experiment]:
    """Yield the config with every combination of values; knobs whose key is not `free` keep theirs.

    The values of the first knob change slowest.
    """
    if not knobs:
        yield config
        return
    knob, *rest = knobs
    if knob.key not in free or not knob.applies(config):
        yield from combinations(rest, config, cluster, free)
        return
    for value in knob.values(config, cluster):
        yield from combinations(rest, knob.chosen(config, value), cluster, free)


def text_of(knobs: Sequence[Knob], settings: Settings) -> str:
    """Return the values of some knobs as one text, such as `ZeRO-2, bf16` or `blocks/2 + offload`."""
    pairs = [(knob, value) for knob, value in zip(knobs, settings, strict=True) if value is not None]
    return "".join(
        knob.text(value) for n, (knob, value) in enumerate(pairs) if n == 0 or value not in knob.plain
    )


def columns_of(config: Experiment, knobs: Sequence[Knob] = KNOBS) -> dict[str, str]:
    """Return the text of each column that shows some knobs."""
    columns = {knob.column: [one for one in knobs if one.column == knob.column] for knob in knobs}
    return {column: text_of(shown, settings_of(config, shown)) for column, shown in columns.items()}


def is_plain(config: Experiment, column: str) -> bool:
    """Return whether all knobs of a column have their values of plain data parallelism."""
    shown = [knob for knob in KNOBS if knob.column == column]
    return all(
        value is None or value in knob.plain
        for knob, value in zip(shown, settings_of(config, shown), strict=True)
    )


def plain_settings() -> list[dict[str, Any]]:
    """Return the values of plain data parallelism by key, the best combination first."""
    fixed = [knob for knob in KNOBS if knob.plain]
    return [
        dict(zip((k.key for k in fixed), values, strict=True))
        for values in product(*(k.plain for k in fixed))
    ]


def traits_of(config: Experiment) -> dict[str, str]:
    """Return the traits of a config, by which trials may correct its predictions.

    The switches of one trait count together: `yes` if any of them is on.
    """
    traits = {}
    for trait in TRAITS:
        values = [knob.of(config) for knob in KNOBS if knob.trait == trait]
        traits[trait] = ("yes" if any(values) else "no") if isinstance(values[0], bool) else str(values[0])
    return traits


def value_order(trait: str) -> Callable[[str], tuple[int, str]]:
    """Return the sort key of a trait's values: their order in the config's schema, if it lists them."""
    *sections, leaf = next(knob.key for knob in KNOBS if knob.trait == trait).split(".")
    schema: Any = Experiment
    for name in sections:
        schema = schema.model_fields[name].annotation
    listed = [str(value) for value in get_args(schema.model_fields[leaf].annotation)]
    return lambda value: (listed.index(value) if value in listed else 0, value)


def bucket_sizes(config: Experiment) -> Sequence[int]:
    """Return the bucket sizes, in values, to try beside those of the DeepSpeed file.

    Buckets cost nothing at stage 0, matter little beside copies to the host, and a user's file keeps its own.
    """
    parallelism = config.parallelism
    fixed = parallelism.zero_stage == 0 or parallelism.offload_to_cpu or parallelism.ds_config is not None
    return () if fixed else _BUCKETS
