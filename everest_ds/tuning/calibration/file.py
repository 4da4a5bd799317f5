"""The calibration file of a machine: its measurements, valid for this hardware and software only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everest_ds.costs.hardware.machine import Machine
from everest_ds.errors import UsageError

# The number increases when the meaning of a key changes.
CALIBRATION_FORMAT = "everest-ds calibration, format 1"
_FIX = "everest-ds tune --calibrate"


@dataclass(frozen=True)
class Calibration:
    """The measurements of a machine, with their date and the facts that identify it.

    Attributes:
        facts: device, cores and versions; a user of the calibration must match all of them.
        date: date of the measurement, ISO 8601.
        machines: fitted machine by the number of ranks that worked at the same time on a node.
    """

    facts: Mapping[str, str]
    date: str
    machines: Mapping[int, Machine]

    def machine(self, num_ranks: int) -> Machine:
        """Return the machine as calibrated for `num_ranks` ranks; on GPUs, for at least that many.

        Raises:
            UsageError: the machine was not calibrated for this number of ranks.
        """
        found = self.machines.get(num_ranks)
        larger = [n for n, machine in self.machines.items() if n > num_ranks and machine.asynchronous]
        if found is None and not larger:
            raise UsageError(
                "not calibrated for this number of ranks",
                given=num_ranks,
                allowed=", ".join(map(str, sorted(self.machines))),
                fix=f"{_FIX} --nproc {num_ranks}",
            )
        return found or self.machines[min(larger)]

    def write(self, file: Path) -> None:
        """Write the calibration to `file` as JSON.

        Raises:
            UsageError: the file cannot be written.
        """
        machines = {str(n): machine.as_json() for n, machine in self.machines.items()}
        tree = {
            "format": CALIBRATION_FORMAT,
            "facts": dict(self.facts),
            "date": self.date,
            "machines": machines,
        }
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(tree, indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"{file}: cannot write the calibration", given=str(error)) from None


def read_calibration(file: Path, facts: Mapping[str, str]) -> Calibration:
    """Read the calibration in `file` and check that it matches the `facts` of this machine.

    Raises:
        UsageError: the file is missing or damaged, or belongs to another machine or other software.
    """
    tree = _read(file)
    for name, here in facts.items():
        if tree["facts"].get(name) != here:
            raise UsageError(
                f"{file}: the calibration differs from this machine in {name}",
                given=f"{tree['facts'].get(name)} in the file, {here} on this machine",
                fix=_FIX,
            )
    try:
        machines = {int(n): Machine.from_json(machine) for n, machine in tree["machines"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{file}: damaged", given=repr(error), fix=_FIX) from None
    return Calibration(tree["facts"], tree["date"], machines)


def _read(file: Path) -> dict[str, Any]:
    try:
        tree = json.loads(file.read_text())
    except FileNotFoundError:
        raise UsageError(f"{file}: this machine is not calibrated", fix=_FIX) from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: cannot be read", given=str(error), fix=_FIX) from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != CALIBRATION_FORMAT:
        raise UsageError(
            f"{file}: not a calibration of this version",
            given=repr(found),
            allowed=repr(CALIBRATION_FORMAT),
            fix=_FIX,
        )
    return tree
