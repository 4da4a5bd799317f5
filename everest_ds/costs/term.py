"""One term of a predicted step, with the formula and numbers to check it by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TermGroup = Literal["compute", "recompute", "optimizer", "communication", "offload", "data", "overhead"]


@dataclass(frozen=True)
class Term:
    """A part of a predicted step.

    Attributes:
        name: human-readable name, such as `encoder forward`.
        group: the group of terms with which it is summed.
        seconds: time that it adds to the step.
        busy_s: duration, including the time hidden behind other work.
        formula: human-readable formula.
        numbers: values of the formula's variables, by name with unit.
    """

    name: str
    group: TermGroup
    seconds: float
    busy_s: float
    formula: str
    numbers: Mapping[str, float]

    def row(self) -> dict[str, object]:
        """Return the term as a row of a table."""
        numbers = ", ".join(f"{name} {value:,.4g}" for name, value in self.numbers.items())
        return {
            "term": self.name,
            "group": self.group,
            "ms": 1e3 * self.seconds,
            "hidden_ms": 1e3 * (self.busy_s - self.seconds),
            "formula": self.formula,
            "with": numbers,
        }
