"""An invented calibration of this machine, for tests of the code that reads calibrations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from everest_ds.costs.hardware.data_sheet import machine_from_sheet
from everest_ds.costs.hardware.gpus import DEVICES
from everest_ds.launch.local import threads_per_rank
from everest_ds.tuning.calibration.file import Calibration
from everest_ds.tuning.calibration.local_machine import calibration_file, facts_here


def pretend_calibration(*numbers_of_ranks: int) -> Path:
    """Write a calibration to the file that the command line reads; set XDG_CACHE_HOME first."""
    facts = facts_here()
    sheet = machine_from_sheet("T4", DEVICES["T4"])
    machines = {
        ranks: replace(
            sheet,
            device=facts["device"],
            asynchronous=False,
            threads=threads_per_rank(ranks),
            ranks_per_node=ranks,
        )
        for ranks in numbers_of_ranks
    }
    Calibration(facts, "2026-01-01T00:00:00+00:00", machines).write(calibration_file())
    return calibration_file()
