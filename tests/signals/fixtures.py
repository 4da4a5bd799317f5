"""Fixtures of the signal matrix: which cases are tried, and the table of their times."""

from __future__ import annotations

import pytest

from tests.signals.cases import ACCUMULATION, LOCAL_TARGETS, SLURM_TARGETS, Case, all_cases, pairwise
from tests.signals.report import SignalReport


def _chosen(config: pytest.Config, targets: tuple[str, ...]) -> list[Case]:
    cases = all_cases(targets)
    return cases if config.getoption("--every-signal") else pairwise(cases)


@pytest.fixture(scope="session")
def local_cases(pytestconfig: pytest.Config) -> list[Case]:
    """The cases to try on one machine: all with `--every-signal`, otherwise every pair of values."""
    return _chosen(pytestconfig, LOCAL_TARGETS)


@pytest.fixture(scope="session")
def slurm_cases(pytestconfig: pytest.Config) -> list[Case]:
    """The cases to try on a cluster: all with `--every-signal`, otherwise the pairs with accumulation.

    A signal during accumulation is harder to survive, and the pairs without it are tried on one machine.
    """
    chosen = _chosen(pytestconfig, SLURM_TARGETS)
    everything = pytestconfig.getoption("--every-signal")
    return [case for case in chosen if everything or case.accumulation == max(ACCUMULATION)]


@pytest.fixture(scope="session")
def signal_report(pytestconfig: pytest.Config) -> SignalReport:
    """The table that `--signal-report FILE` writes."""
    return SignalReport(pytestconfig.getoption("--signal-report"))
