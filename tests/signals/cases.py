"""The cases of the signal matrix, and a small selection that has every pair of values together once."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterable
from dataclasses import astuple, dataclass

from everest_ds.stop_signals import STOP_SIGNALS

WORKERS = (0, 1, 4)
ACCUMULATION = (1, 4)
LOCAL_TARGETS = ("process group", "launcher", "one rank", "torchrun")
SLURM_TARGETS = ("whole step", "batch shell", "one rank")
PHASES = ("before the first step", "idle", "reading", "saving", "validating")


@dataclass(frozen=True)
class Case:
    """One case of the matrix.

    Attributes:
        number: the signal.
        target: the process or processes that receive it.
        workers: loader workers of a rank.
        accumulation: micro-batches in a step.
        phase: what the run does when the signal comes; "idle" and "reading" are about the workers.
    """

    number: signal.Signals
    target: str
    workers: int
    accumulation: int
    phase: str

    def __str__(self) -> str:
        return (
            f"{self.number.name} to the {self.target}, {self.workers} workers,"
            f" accumulation {self.accumulation}, {self.phase}"
        )


def all_cases(targets: Iterable[str]) -> list[Case]:
    """Return every case for the given targets; a worker can only be busy reading if there is one."""
    found = itertools.starmap(Case, itertools.product(STOP_SIGNALS, targets, WORKERS, ACCUMULATION, PHASES))
    return [case for case in found if case.workers or case.phase != "reading"]


def pairwise(cases: Iterable[Case]) -> list[Case]:
    """Select cases so that any two values that occur together in a case occur together in the selection."""
    left = {case: set(itertools.combinations(enumerate(astuple(case)), 2)) for case in cases}
    missing = set().union(*left.values())
    selected = []
    while missing:
        best = max(left, key=lambda case: len(left[case] & missing))
        missing -= left.pop(best)
        selected.append(best)
    return selected
