"""The signal matrix on one machine: the local launcher and torchrun, with real workers and real videos."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from everest_ds.errors import ExitCode
from tests.signals.cases import ACCUMULATION, Case
from tests.signals.live import (
    KINDS,
    LAUNCHER,
    Start,
    check_alive,
    ended,
    launch,
    make_data,
    rank_process,
    undisturbed,
    write_recipe,
)
from tests.signals.report import Row, SignalReport
from tests.training.runs import losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

# torchrun passes on only the signals that it is told to handle; others end it, but not its ranks.
_TORCHRUN = (
    *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
    *("--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "-m", "everest_ds"),
)


@dataclass
class Chain:
    """A run that is stopped by one signal after the other, and resumes after each."""

    recipe: Path

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.recipe.parent / "run"

    def suffer(self, case: Case) -> Row:
        """Start the run, send the signal in the phase of the case, and measure how the run ends."""
        start = Start.now(self.path)
        under_torchrun = case.target == "torchrun"
        program = _TORCHRUN if under_torchrun else LAUNCHER
        with ended(launch(self.recipe, case.workers, program)) as run:
            start.wait_for(case.phase, lambda: check_alive(run))
            sent = time.monotonic()
            self._send(case, run)
            _, text = run.communicate(timeout=120)
        seconds = time.monotonic() - sent
        if under_torchrun:  # torchrun has its own exit code and prints a traceback of its own
            return start.measure(case, "", run.returncode != ExitCode.OK, seconds)
        return start.measure(case, text, run.returncode == ExitCode.STOPPED, seconds)

    def _send(self, case: Case, run: subprocess.Popen[str]) -> None:
        if case.target == "process group":
            os.killpg(run.pid, case.number)
        elif case.target == "one rank":
            os.kill(rank_process("RANK=1", self.path), case.number)
        else:
            os.kill(run.pid, case.number)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("signals")


@pytest.mark.parametrize("accumulation", ACCUMULATION)
@pytest.mark.parametrize("kind", sorted(set(KINDS.values())))
def test_no_signal_costs_a_step(
    kind: str, accumulation: int, folder: Path, local_cases: list[Case], signal_report: SignalReport
) -> None:
    data = make_data(folder / f"{kind}-{accumulation}-data", kind)
    chain = Chain(write_recipe(data, folder / f"{kind}-{accumulation}", kind, accumulation))
    cases = [c for c in local_cases if KINDS[c.phase] == kind and c.accumulation == accumulation]
    assert cases
    rows = [signal_report.add(chain.suffer(case)) for case in cases]
    assert [row for row in rows if not row.harmless] == []
    assert losses(chain.path) == undisturbed(chain.recipe, max(losses(chain.path)))
