"""Can this machine run EVEREST-DS: what is there, what is missing, what to do about it. Prints nothing."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from everest_ds.launch.local import available_cores
from everest_ds.units import GIB, format_bytes

Status = Literal["ok", "missing", "warning"]

PACKAGES = (
    "torch",
    "deepspeed",
    "fairscale",
    "decord",
    "einops",
    "mpi4py",
    "pyyaml",
    "tensorboard",
    "typer",
    "rich",
    "pydantic",
    "jinja2",
    "matplotlib",
    "safetensors",
    "av",
)
# A checkpoint of ViT-L with fp32 weights and AdamW moments takes about 4 GiB: room for two of them.
_DISK_BYTES = 10 * GIB
_SHARED_MEMORY = Path("/dev/shm")
# A first import of torch from a network file system can take half a minute; beyond this it hangs.
_PROBE_SECONDS = 60.0

# Run in their own processes: this module stays free of torch, and a crash in a native library is a finding.
_TORCH_PROBE = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "backends": [name for name in ("nccl", "gloo")
                 if dist.is_available() and getattr(dist, f"is_{name}_available")()],
    "bf16": torch.cuda.is_bf16_supported() if cuda else None,
    "cpu": torch.backends.cpu.get_cpu_capability(),
}))
"""
_MPI_PROBE = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(" ".join(MPI.Get_library_version().splitlines()[0].split()))
"""


@dataclass(frozen=True)
class Finding:
    """One row of the report: `fix` is empty where nothing is to be done."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    required: bool = False


def examine(shared_bytes_per_rank: int) -> list[Finding]:
    """Look at interpreter, packages, accelerator, machine and tools; takes seconds, changes nothing.

    Args:
        shared_bytes_per_rank: shared memory that the loader of one rank fills, with one rank on each GPU.
    """
    with ThreadPoolExecutor(max_workers=3) as pool:  # each waits for a process of its own
        torch = pool.submit(run_probe, [sys.executable, "-c", _TORCH_PROBE])
        mpi = pool.submit(run_probe, [sys.executable, "-c", _MPI_PROBE])
        slurm = pool.submit(_slurm)
        return [
            _python(sys.version_info[:2]),
            *map(_package, PACKAGES),
            *_accelerator(torch.result()),
            _mpi_library(mpi.result()),
            _cores(),
            _memory(),
            _disk(Path.cwd()),
            check_shared_memory(shared_bytes_per_rank * max(1, _num_devices(torch.result()))),
            slurm.result(),
            _mpirun(),
            _compiler(os.environ),
        ]


def main_job_can_run(findings: Sequence[Finding]) -> bool:
    """Whether training can start here: nothing that is required is missing."""
    return not any(finding.required and finding.status == "missing" for finding in findings)


@dataclass(frozen=True)
class Outcome:
    """The last line (or all) that a probe process wrote: to stdout if it succeeded, else to stderr."""

    succeeded: bool
    line: str


def run_probe(command: Sequence[str], all_lines: bool = False) -> Outcome:
    """Run a short program; never raises, never waits for ever."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Outcome(False, f"no answer in {_PROBE_SECONDS:.0f} s")
    except OSError as error:
        return Outcome(False, str(error))
    succeeded = done.returncode == 0
    if succeeded and all_lines:
        return Outcome(True, done.stdout.strip())
    lines = (done.stdout if succeeded else done.stderr).strip().splitlines()
    return Outcome(succeeded, lines[-1] if lines else f"no output, exit code {done.returncode}")


def _python(version: tuple[int, int]) -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    if version < (3, 10):
        return Finding("Python", "missing", detail, "install Python 3.10 to 3.12", required=True)
    if version > (3, 12):
        return Finding("Python", "warning", f"{detail}: not tested", "use Python 3.10 to 3.12", required=True)
    return Finding("Python", "ok", detail, required=True)


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name), required=True)
    except metadata.PackageNotFoundError:
        return Finding(name, "missing", "not installed", f"pip install {name}", required=True)


def _accelerator(probe: Outcome) -> list[Finding]:
    """What torch finds: the devices, the backend of torch.distributed that will serve them, and bf16."""
    if not probe.succeeded:
        return [
            Finding(
                "accelerator",
                "missing",
                f"torch does not import: {probe.line}",
                "reinstall torch",
                required=True,
            )
        ]
    found: dict[str, Any] = json.loads(probe.line)
    return [_devices(found), _backend(found), _bf16(found)]


def _num_devices(probe: Outcome) -> int:
    return len(json.loads(probe.line)["devices"]) if probe.succeeded else 0


def _devices(found: Mapping[str, Any]) -> Finding:
    if found["devices"]:
        return Finding("accelerator", "ok", f"{len(found['devices'])} x {found['devices'][0]}")
    detail = f"no CUDA device for torch {found['version']}: runs on the CPU"
    return Finding(
        "accelerator", "warning", detail, "with a GPU here: install torch's CUDA build and the driver"
    )


def _backend(found: Mapping[str, Any]) -> Finding:
    wanted = "nccl" if found["devices"] else "gloo"
    if wanted in found["backends"]:
        return Finding("collective backend", "ok", wanted, required=True)
    detail = f"this torch is built without {wanted}"
    return Finding(
        "collective backend", "missing", detail, "install an official build of torch", required=True
    )


def _bf16(found: Mapping[str, Any]) -> Finding:
    if found["bf16"] is None:
        return Finding(
            "bf16", "ok", f"on the CPU ({found['cpu']}): fast with AVX512-BF16 or AMX, slow without"
        )
    if found["bf16"]:
        return Finding("bf16", "ok", "supported by the GPU")
    return Finding("bf16", "warning", "not supported by the GPU", "train in fp16 or fp32")


def _mpi_library(probe: Outcome) -> Finding:
    if probe.succeeded:
        return Finding("MPI library", "ok", probe.line)
    return Finding("MPI library", "warning", f"only for mpirun: {probe.line}", "pip install mpi4py mpich")


def _cores() -> Finding:
    return Finding("CPU cores", "ok", f"{available_cores()} of {os.cpu_count()} usable")


def _memory() -> Finding:
    return Finding("memory", "ok", format_bytes(_memory_bytes()))


def _memory_bytes() -> int:
    """The machine's memory, or less where a control group (a container, a SLURM job) has a lower limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    detail = f"{format_bytes(free)} free in {folder}"
    if free < _DISK_BYTES:
        return Finding("disk", "warning", detail, f"free {format_bytes(_DISK_BYTES)} for checkpoints")
    return Finding("disk", "ok", detail)


def check_shared_memory(needed_bytes: int, folder: Path = _SHARED_MEMORY) -> Finding:
    """Compare what is free in shared memory with what loader workers of this node hand over there."""
    name = "shared memory"
    if not folder.is_dir():
        return Finding(name, "ok", f"no {folder} on this system")
    free = shutil.disk_usage(folder).free
    detail = f"{format_bytes(free)} free in {folder}"
    if free >= needed_bytes:
        return Finding(name, "ok", detail)
    size = -(-needed_bytes // GIB)
    fix = (
        f"give it {size} GiB (docker run --shm-size={size}g, or mount -o remount,size={size}g {folder}),"
        " or lower data.num_workers or batch.micro_batch_size"
    )
    return Finding(name, "warning", f"{detail}; loader workers need {format_bytes(needed_bytes)}", fix)


def _slurm() -> Finding:
    path = shutil.which("sbatch")
    if path is None:
        detail = "no sbatch on PATH: not needed for local runs"
        return Finding("SLURM", "warning", detail, "submit jobs from a login node of the cluster")
    version = run_probe([path, "--version"])
    if not version.succeeded:
        return Finding(
            "SLURM", "warning", f"{path}: {version.line}", "repair the configuration of SLURM's client"
        )
    return Finding("SLURM", "ok", f"{version.line} at {path}")


def _mpirun() -> Finding:
    path = _first_on_path("mpirun", "mpiexec")
    if path is None:
        detail = "not on PATH: needed only to start ranks by MPI"
        return Finding("mpirun", "warning", detail, "pip install mpich")
    return Finding("mpirun", "ok", path)


def _compiler(environ: Mapping[str, str]) -> Finding:
    path = _first_on_path(environ.get("CXX", "c++"), "g++", "clang++")
    if path is None:
        detail = "not found: needed only for the operations that DeepSpeed compiles, such as its CPU Adam"
        return Finding("C++ compiler", "warning", detail, "install g++ and ninja")
    return Finding("C++ compiler", "ok", path)


def _first_on_path(*commands: str) -> str | None:
    return next(filter(None, map(shutil.which, commands)), None)
