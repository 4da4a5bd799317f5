"""One term of a predicted step, with all that is needed to follow it by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Group = Literal["compute", "recompute", "optimizer", "communication", "offload", "data", "overhead"]


@dataclass(frozen=True)
class Term:
    """A part of a step.

    Attributes:
        name: such as `encoder forward`.
        group: what it is summed up with.
        seconds: by which it makes the step longer.
        busy_s: how long it takes, hidden behind other work or not.
        formula: for people.
        numbers: what the formula was evaluated with; units in names.
    """

    name: str
    group: Group
    seconds: float
    busy_s: float
    formula: str
    numbers: Mapping[str, float]

    def row(self) -> dict[str, object]:
        """For a table."""
        numbers = ", ".join(f"{name} {value:,.4g}" for name, value in self.numbers.items())
        return {
            "term": self.name,
            "group": self.group,
            "ms": 1e3 * self.seconds,
            "hidden_ms": 1e3 * (self.busy_s - self.seconds),
            "formula": self.formula,
            "with": numbers,
        }
