"""Fixtures of the signal matrix: which cases are tried, and the table of their times."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.signals.cases import LOCAL_TARGETS, SLURM_TARGETS, Case, all_cases, pairwise
from tests.signals.report import Row, to_markdown


def _chosen(config: pytest.Config, targets: tuple[str, ...]) -> list[Case]:
    cases = all_cases(targets)
    return cases if config.getoption("--every-signal") else pairwise(cases)


@pytest.fixture(scope="session")
def local_cases(pytestconfig: pytest.Config) -> list[Case]:
    """The cases to try on one machine: all with `--every-signal`, otherwise every pair of values."""
    return _chosen(pytestconfig, LOCAL_TARGETS)


@pytest.fixture(scope="session")
def slurm_cases(pytestconfig: pytest.Config) -> list[Case]:
    """The cases to try on a cluster: all with `--every-signal`, otherwise every pair of values."""
    return _chosen(pytestconfig, SLURM_TARGETS)


@pytest.fixture(scope="session")
def signal_rows(pytestconfig: pytest.Config) -> Iterator[list[Row]]:
    """The rows of the table that `--signal-report FILE` writes."""
    rows: list[Row] = []
    yield rows
    file = pytestconfig.getoption("--signal-report")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(to_markdown(rows))
