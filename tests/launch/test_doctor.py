"""Tests of the doctor: it names every missing item with a fix, and does not itself import torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from everest_ds.launch import doctor
from everest_ds.launch.doctor import Finding, examine, main_job_can_run
from everest_ds.units import format_bytes


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    rows = examine(shared_bytes_per_rank=2**20)
    assert len({finding.name for finding in rows}) == len(rows)
    return {finding.name: finding for finding in rows}


def test_every_row_is_there(findings: dict[str, Finding]) -> None:
    machine = {
        "CPU cores",
        "memory",
        "disk",
        "shared memory",
        "SLURM",
        "mpirun",
        "C++ compiler",
        "MPI library",
    }
    assert {"Python", "accelerator", *doctor.PACKAGES, *machine} <= findings.keys()


def test_whatever_is_not_ok_says_what_to_do(findings: dict[str, Finding]) -> None:
    assert [finding for finding in findings.values() if finding.status != "ok" and not finding.fix] == []


def test_cluster_tools_are_optional(findings: dict[str, Finding]) -> None:
    optional = ("SLURM", "mpirun", "C++ compiler", "MPI library")
    assert not any(findings[name].required for name in optional)


def test_the_backend_follows_the_device_torch_finds(findings: dict[str, Finding]) -> None:
    torch = pytest.importorskip("torch", reason="torch is missing")
    assert findings["collective backend"].detail == ("nccl" if torch.cuda.is_available() else "gloo")


def test_only_a_missing_required_row_stops_the_main_job() -> None:
    def row(status: doctor.Status, required: bool) -> Finding:
        return Finding("x", status, "", "", required)

    assert main_job_can_run([row("ok", True), row("warning", True), row("missing", False)])
    assert not main_job_can_run([row("ok", True), row("missing", True)])


def test_a_package_that_is_not_installed_is_missing_with_its_pip_line() -> None:
    finding = doctor._package("no-such-package-of-everest")
    assert (finding.status, finding.fix) == ("missing", "pip install no-such-package-of-everest")


def test_python_outside_the_supported_range_is_reported() -> None:
    assert [doctor._python(version).status for version in ((3, 9), (3, 10), (3, 12), (3, 13))] == [
        "missing",
        "ok",
        "ok",
        "warning",
    ]


def test_a_torch_that_does_not_import_is_a_finding_with_its_last_error_line() -> None:
    probe = doctor.run_probe([sys.executable, "-c", "raise ImportError('libcudart.so.12: no such file')"])
    (finding,) = doctor._accelerator(probe)
    assert finding.status == "missing" and finding.required
    assert "libcudart.so.12" in finding.detail


def test_the_fix_of_a_torch_without_devices_depends_on_its_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    def fix(cuda: str | None) -> str:
        seen = {"version": "2.9", "cuda": cuda, "devices": [], "backends": ["gloo"], "bf16": None, "cpu": ""}
        return doctor._accelerator(doctor.ProbeOutput(True, json.dumps(seen)))[0].fix

    assert "install torch's CUDA build instead" in fix(None)
    assert fix("12.8").endswith("install its driver; this torch is built for CUDA 12.8")
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    assert "the driver may be too old for CUDA 13.0" in fix("13.0")


def test_an_mpi_library_is_all_that_an_installed_mpi4py_lacks() -> None:
    pytest.importorskip("mpi4py", reason="mpi4py is missing")
    finding = doctor._mpi_library(doctor.ProbeOutput(False, "RuntimeError: cannot load MPI library"))
    assert finding.fix == "pip install mpich"


def test_a_probe_that_hangs_or_cannot_start_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_PROBE_SECONDS", 0.2)
    assert "no answer" in doctor.run_probe([sys.executable, "-c", "import time; time.sleep(30)"]).line
    assert "no-such-program" in doctor.run_probe(["/no-such-program"]).line


def test_an_empty_path_is_survived_and_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = [doctor._slurm(), doctor._tool("mpirun", ["mpirun", "mpiexec"], "to start ranks", "install it")]
    assert [finding.status for finding in found] == ["warning"] * 2


def test_too_little_shared_memory_is_reported_with_both_figures(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    assert doctor.check_shared_memory(free // 2, tmp_path).status == "ok"
    assert doctor.check_shared_memory(2**40, tmp_path / "none").status == "ok"
    finding = doctor.check_shared_memory(2 * free, tmp_path)
    assert finding.status == "warning" and f"loader workers need {format_bytes(2 * free)}" in finding.detail
    assert "--shm-size=" in finding.fix and "data.num_workers" in finding.fix


def test_the_launch_layer_stays_free_of_torch_and_mpi() -> None:
    program = (
        "import sys; from everest_ds.launch import doctor, environment, local, slurm_nodelist\n"
        "doctor.examine(1)\n"
        "print({'torch', 'deepspeed', 'mpi4py'} & sys.modules.keys() or 'none')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout == "none\n", done.stderr
