"""A candidate of the tuner: a complete config with its predictions and, once it has run, its trial."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from everest_ds.config.load import flatten
from everest_ds.config.schema import Experiment
from everest_ds.config.zero_settings import ZeroSettings
from everest_ds.costs.memory import MemoryPrediction
from everest_ds.costs.step_time import StepPrediction
from everest_ds.tuning.knobs import DETAIL, VARIANT, columns_of, is_plain, traits_of
from everest_ds.tuning.space import Sharding
from everest_ds.tuning.trials.record import Trial


@dataclass(frozen=True)
class Candidate:
    """A complete config, with its predictions and its trial.

    Attributes:
        config: the complete config.
        base: the config as the user gave it.
        zero: settings of its DeepSpeed file.
        memory: predicted memory of a rank.
        needed_bytes: predicted memory that a rank must have.
        step: predicted time of a step.
        own_buckets: the bucket sizes differ from those of a shipped DeepSpeed file.
        trial: the result of its trial; None if it has none.
        baseline: name of the baseline that it is, or "".
        note: human-readable note, such as how the baseline differs from its name.
    """

    config: Experiment
    base: Experiment = field(repr=False)
    zero: ZeroSettings
    memory: MemoryPrediction
    needed_bytes: int
    step: StepPrediction
    own_buckets: bool = False
    trial: Trial | None = None
    baseline: str = ""
    note: str = ""

    @property
    def sharding(self) -> Sharding:
        """The sharding of the candidate, which is its family in the tables."""
        return Sharding.of(self.config)

    @property
    def name(self) -> str:
        """A human-readable name, such as `ZeRO-2, tensor 2, bf16, micro-batch 8, full`."""
        columns = columns_of(self.config, VARIANT)
        variants = [text for column, text in columns.items() if not is_plain(self.config, column)]
        buckets = ["own buckets"] * self.own_buckets
        return ", ".join([str(self.sharding), *detail_names(self.config), *variants, *buckets])

    @property
    def traits(self) -> dict[str, str]:
        """The properties by which trials may correct its predictions."""
        return traits_of(self.config)

    @property
    def measured(self) -> Trial | None:
        """The trial if it ended with a measurement, otherwise None."""
        return self.trial if self.trial and self.trial.outcome == "measured" else None

    @property
    def overrides(self) -> tuple[str, ...]:
        """The `key=value` of each key that differs from the given config; bucket sizes are left out."""
        given = dict(flatten(self.base.model_dump(mode="json")))
        own = flatten(self.config.model_dump(mode="json"))
        return tuple(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in own
            if given[key] != value
        )

    @property
    def order(self) -> tuple[float, float]:
        """The sort key: fastest step first; among equals, the shortest step without data first."""
        seconds = self.step.step_s
        without_data = seconds - self.step.split()["data"]
        # Rounded, so that equal terms summed in another order count as a tie.
        return float(f"{seconds:.4g}"), float(f"{without_data:.6g}")


def detail_names(config: Experiment) -> list[str]:
    """Return a name for each detail of a config, such as `micro-batch 8`."""
    return [f"{knob.trait} {knob.of(config)}" for knob in DETAIL if knob.trait]
