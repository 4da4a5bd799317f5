"""The rates of this machine, calibrated once: measured with all of its ranks running at the same time."""

from __future__ import annotations

import os
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from everest_ds.cache import cache_folder
from everest_ds.costs.hardware.gpus import peak_flops_per_s
from everest_ds.costs.hardware.machine import Machine
from everest_ds.errors import ExitCode, UsageError
from everest_ds.launch.environment import detect_environment
from everest_ds.launch.local import available_cores, launch_local, threads_per_rank
from everest_ds.tuning.calibration.file import Calibration, read_calibration
from everest_ds.tuning.calibration.fit import fit_machine

if TYPE_CHECKING:
    from everest_ds.parallel.world import World

# This allocator setting decides how often a CPU rank gets fresh pages, which can cost as much time as the
# arithmetic of a step (docs/parallel.md).
_ALLOCATOR = "MALLOC_MMAP_THRESHOLD_"
_BUSY_LOAD = 0.5  # load per core above which a calibration warns
_CALIBRATE = "everest-ds tune --calibrate --nproc {}"


def calibration_file() -> Path:
    """Return the default path of a user's calibration file."""
    return cache_folder() / "calibration.json"


def machine_here(num_ranks: int, file: Path | None = None) -> Machine:
    """Return the calibrated rates of this machine when it runs `num_ranks` ranks.

    Raises:
        UsageError: there is no calibration for that many ranks, or cores, threads or software changed since.
    """
    file = file or calibration_file()
    machine = read_calibration(file, facts_here()).machine(num_ranks)
    here = threads_per_rank(num_ranks)
    if not machine.asynchronous and machine.threads != here:
        raise UsageError(
            f"{file}: calibrated with another number of threads per rank",
            given=f"{machine.threads} threads in the calibration, {here} now",
            fix=f"set OMP_NUM_THREADS={machine.threads}, or run {_CALIBRATE.format(num_ranks)}",
        )
    return machine


def facts_here() -> dict[str, str]:
    """Return what the rates of this machine depend on: device, cores, allocator setting and versions."""
    from everest_ds.profiling.device import this_device
    from everest_ds.profiling.step_measurement import device_name

    versions = {name: version(name) for name in ("torch", "deepspeed")}
    allocator = os.environ.get(_ALLOCATOR, "unset")
    return {
        "device": device_name(this_device()),
        "cores": str(available_cores()),
        _ALLOCATOR: allocator,
        **versions,
    }


def calibrate(nproc: int | None, file: Path | None) -> int:
    """Measure this machine and write its calibration; under a launcher, do so as one of its ranks.

    Args:
        nproc: the highest number of ranks; default: one per GPU, or one per core. CPU ranks share the
            machine, so 1, 2, 4 and so on of them are measured.
        file: path of the calibration file; None for the default.

    Returns:
        The exit code of the ranks.
    """
    file = file or calibration_file()
    if "WORLD_SIZE" in os.environ:
        _as_rank(file)
        return ExitCode.OK
    from everest_ds.profiling.device import num_gpus

    _warn_if_busy(available_cores())
    on_gpus = num_gpus() > 0
    most = nproc or num_gpus() or available_cores()
    powers_of_two = (2**power for power in range(most.bit_length()))
    for number in [most] if on_gpus else sorted({most, *powers_of_two}):
        ranks = f"{number} ranks at the same time" if number > 1 else "1 rank"
        print(f"measuring {ranks} ...", file=sys.stderr)
        code = launch_local(number, ["tune", "--calibrate", "--calibration", str(file)], log_dir=None)
        if code:
            return code
    print(f"calibration written to {file}")
    return ExitCode.OK


def _warn_if_busy(cores: int) -> None:
    """Warn if other work would distort the measured rates: the calibration would not show it later."""
    load = os.getloadavg()[0]
    if load > _BUSY_LOAD * cores:
        print(
            f"warning: this machine is busy (load {load:.1f}, {cores} cores): measured rates will be too low;"
            " calibrate again when it is idle",
            file=sys.stderr,
        )


def _as_rank(file: Path) -> None:
    from everest_ds.parallel.world import explained_failures, join_world, leave_world

    os.environ.update(detect_environment().as_variables())
    world = join_world()
    with explained_failures(world):
        _measure_and_write(world, file)
    leave_world()


def _measure_and_write(world: World, file: Path) -> None:
    from everest_ds.tuning.calibration.measure import measure_machine

    found = measure_machine(world)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    peaks = {name: peak_flops_per_s(found.device, name) for name in found.products}
    known = {name: peak for name, peak in peaks.items() if peak is not None}

    def write() -> None:
        machine = fit_machine(found, known, f"calibrated {now} over {world.size} ranks")
        facts = facts_here()
        Calibration(facts, now, {**_earlier_results(file, facts), world.size: machine}).write(file)

    world.share(write)


def _earlier_results(file: Path, facts: dict[str, str]) -> dict[int, Machine]:
    """Return the earlier results for other numbers of ranks, unless the machine has changed since."""
    try:
        return dict(read_calibration(file, facts).machines)
    except UsageError:
        return {}
