"""Checks of a machine before it runs EVEREST-DS, returned as findings, each with a status and a fix."""

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
# Room for two checkpoints of ViT-L: one with fp32 weights and AdamW moments takes about 4 GiB.
_DISK_BYTES = 10 * GIB
_SHARED_MEMORY = Path("/dev/shm")
# The first import of torch from a network file system can take half a minute; a slower probe is hanging.
_PROBE_SECONDS = 60.0

# Both programs run in processes of their own: this module does not import torch, and a crash in a native
# library becomes a finding.
_TORCH_PROBE = """
import json, torch, torch.distributed as dist
cuda = torch.cuda.is_available()
print(json.dumps({
    "version": torch.__version__,
    "cuda": torch.version.cuda,
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
    """One row of the report; `fix` is empty if no action is needed."""

    name: str
    status: Status
    detail: str
    fix: str = ""
    required: bool = False


def examine(shared_bytes_per_rank: int) -> list[Finding]:
    """Check interpreter, packages, accelerator, machine and tools, in a few seconds and without side effects.

    Args:
        shared_bytes_per_rank: shared memory that the loader of one rank fills, with one rank per GPU.
    """
    with ThreadPoolExecutor(max_workers=3) as pool:  # every thread waits for one child process
        torch = pool.submit(run_probe, [sys.executable, "-c", _TORCH_PROBE])
        mpi = pool.submit(run_probe, [sys.executable, "-c", _MPI_PROBE])
        slurm = pool.submit(_slurm)
        probe = torch.result()
        num_devices = len(json.loads(probe.line)["devices"]) if probe.succeeded else 0
        return [
            _python(sys.version_info[:2]),
            *map(_package, PACKAGES),
            *_accelerator(probe),
            _mpi_library(mpi.result()),
            Finding("CPU cores", "ok", f"{available_cores()} of {os.cpu_count()} available to this process"),
            Finding("memory", "ok", format_bytes(_memory_bytes())),
            _disk(Path.cwd()),
            check_shared_memory(shared_bytes_per_rank * max(1, num_devices)),
            slurm.result(),
            _tool("mpirun", ["mpirun", "mpiexec"], "to start ranks with MPI", "pip install mpich"),
            _tool(
                "C++ compiler",
                [os.environ.get("CXX", "c++"), "g++", "clang++"],
                "for the operations that DeepSpeed compiles, such as CPU Adam",
                "install g++ and ninja",
            ),
        ]


def main_job_can_run(findings: Sequence[Finding]) -> bool:
    """Return whether training can start on this machine, with no required item missing."""
    return not any(finding.required and finding.status == "missing" for finding in findings)


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class ProbeOutput:
    """The result of a probe process: its last line (or all lines) on stdout, or on stderr if it failed."""

    succeeded: bool
    line: str


def run_probe(command: Sequence[str], all_lines: bool = False) -> ProbeOutput:
    """Run a short program with a time limit, and report every failure as an outcome instead of raising."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PROBE_SECONDS, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return ProbeOutput(False, f"no answer within {_PROBE_SECONDS:.0f} s")
    except OSError as error:
        return ProbeOutput(False, str(error))
    succeeded = done.returncode == 0
    if succeeded and all_lines:
        return ProbeOutput(True, done.stdout.strip())
    lines = (done.stdout if succeeded else done.stderr).strip().splitlines()
    return ProbeOutput(succeeded, lines[-1] if lines else f"no output, exit code {done.returncode}")


def _python(version: tuple[int, int]) -> Finding:
    detail = f"{platform.python_version()} at {sys.executable}"
    if version < (3, 10):
        return Finding("Python", "missing", detail, "install Python 3.10 to 3.12", required=True)
    if version > (3, 12):
        untested = f"{detail}: EVEREST-DS is not tested with it"
        return Finding("Python", "warning", untested, "use Python 3.10 to 3.12", required=True)
    return Finding("Python", "ok", detail, required=True)


def _package(name: str) -> Finding:
    version = installed_version(name)
    if version is None:
        return Finding(name, "missing", "not installed", f"pip install {name}", required=True)
    return Finding(name, "ok", version, required=True)


def _accelerator(probe: ProbeOutput) -> list[Finding]:
    """Report what torch supports here: the devices, their torch.distributed backend, and bf16."""
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
    device = Finding(
        "accelerator",
        "warning",
        f"torch {found['version']} finds no CUDA device: training runs on the CPU",
        "on a machine with a GPU: " + _cuda_fix(found["cuda"]),
    )
    if found["devices"]:
        device = Finding("accelerator", "ok", f"{len(found['devices'])} x {found['devices'][0]}")
    wanted = "nccl" if found["devices"] else "gloo"
    backend = Finding("collective backend", "ok", wanted, required=True)
    if wanted not in found["backends"]:
        detail, fix = f"the installed torch is built without {wanted}", "install an official build of torch"
        backend = Finding("collective backend", "missing", detail, fix, required=True)
    return [device, backend, _bf16(found)]


def _cuda_fix(cuda: str | None) -> str:
    """Return what a torch built for version `cuda` (None: for the CPU only) needs to find the GPU."""
    if cuda is None:
        return "install torch's CUDA build instead of this one for the CPU, and the GPU's driver"
    if shutil.which("nvidia-smi") is None:
        return f"install its driver; this torch is built for CUDA {cuda}"
    return f"see `nvidia-smi`: the driver may be too old for CUDA {cuda}, or CUDA_VISIBLE_DEVICES hide it"


def _bf16(found: Mapping[str, Any]) -> Finding:
    if found["bf16"] is None:
        return Finding(
            "bf16",
            "ok",
            f"supported by the CPU ({found['cpu']}): fast with AVX512-BF16 or AMX, slow otherwise",
        )
    if found["bf16"]:
        return Finding("bf16", "ok", "supported by the GPU")
    return Finding("bf16", "warning", "not supported by the GPU", "train in fp16 or fp32")


def _mpi_library(probe: ProbeOutput) -> Finding:
    if probe.succeeded:
        return Finding("MPI library", "ok", probe.line)
    detail = f"needed only to start ranks with MPI: {probe.line}"
    fix = "pip install mpi4py mpich" if installed_version("mpi4py") is None else "pip install mpich"
    return Finding("MPI library", "warning", detail, fix)


def _memory_bytes() -> int:
    """Return the memory available to this process, in bytes.

    That is the machine's memory, or the limit of a control group (a container, a SLURM job) if that is lower.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    detail = f"{format_bytes(free)} free in {folder}"
    if free < _DISK_BYTES:
        fix = f"have at least {format_bytes(_DISK_BYTES)} free for checkpoints"
        return Finding("disk", "warning", detail, fix)
    return Finding("disk", "ok", detail)


def check_shared_memory(needed_bytes: int, folder: Path = _SHARED_MEMORY) -> Finding:
    """Compare the free shared memory with the amount that the loader workers of this node need."""
    name = "shared memory"
    if not folder.is_dir():
        return Finding(name, "ok", f"no {folder} on this system")
    free = shutil.disk_usage(folder).free
    detail = f"{format_bytes(free)} free in {folder}"
    if free >= needed_bytes:
        return Finding(name, "ok", detail)
    size = -(-needed_bytes // GIB)
    fix = (
        f"enlarge it to {size} GiB (docker run --shm-size={size}g, mount -o remount,size={size}g {folder}),"
        " or lower data.num_workers or batch.micro_batch_size"
    )
    return Finding(name, "warning", f"{detail}; loader workers need {format_bytes(needed_bytes)}", fix)


def _slurm() -> Finding:
    path = shutil.which("sbatch")
    if path is None:
        detail = "sbatch is not on PATH: needed only to submit jobs"
        return Finding("SLURM", "warning", detail, "submit jobs from a login node of the cluster")
    version = run_probe([path, "--version"])
    if not version.succeeded:
        return Finding(
            "SLURM", "warning", f"{path}: {version.line}", "repair the configuration of SLURM's client"
        )
    return Finding("SLURM", "ok", f"{version.line} at {path}")


def _tool(name: str, commands: Sequence[str], purpose: str, fix: str) -> Finding:
    """Look for an optional program, under any of several names."""
    path = next(filter(None, map(shutil.which, commands)), None)
    if path is None:
        return Finding(name, "warning", f"{commands[0]} is not on PATH: needed only {purpose}", fix)
    return Finding(name, "ok", path)
