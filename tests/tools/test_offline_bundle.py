"""Tests of the folder of wheels for machines without a network: it is complete and installs."""

from __future__ import annotations

import os
import subprocess
import sys
from email.message import Message
from pathlib import Path
from zipfile import ZipFile

import pytest
from offline_requirements import missing
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def wheel(folder: Path, name: str, *needed: str) -> Path:
    file = folder / f"{name}-1.0-py3-none-any.whl"
    metadata = Message()
    metadata["Name"], metadata["Version"] = name, "1.0"
    for one in needed:
        metadata.add_header("Requires-Dist", one)
    with ZipFile(file, "w") as archive:
        archive.writestr(f"{name}-1.0.dist-info/METADATA", str(metadata))
    return file


def test_markers_and_pins_are_of_the_python_that_installs(tmp_path: Path) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# tested\nnumpy==2.4; python_version >= '3.11'\nnumpy==2.2; python_version < '3.11'\n")
    ours = wheel(
        tmp_path,
        "ours",
        "torch>=2.6",
        "Other_One>=1",
        "numpy>=1.26",
        "tomli; python_version < '3.11'",
        "colorama; sys_platform == 'win32'",
        "pytest; extra == 'dev'",
        "rich<20,>=13",
    )
    other = wheel(tmp_path, "other_one", "numpy")
    newer = missing("3.12", pins, [ours, other])
    assert newer == ["numpy==2.4", "rich<20,>=13"]
    assert missing("3.10", pins, [ours, other]) == ["numpy==2.2", "rich<20,>=13", "tomli"]


def needed_by(file: Path) -> list[Requirement]:
    with ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(name).decode().split("\n\n")[0].splitlines()
    texts = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]
    return [r for r in map(Requirement, texts) if r.marker is None or r.marker.evaluate({"extra": ""})]


@pytest.mark.slow
def test_the_bundle_is_complete_and_installs_without_an_index(tmp_path: Path) -> None:
    """The bundle holds every requirement but torch in a version that fits, and the package imports."""
    folder, site = tmp_path / "bundle", tmp_path / "site"
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "tools/offline_bundle.sh"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheels = {parse_wheel_filename(file.name)[0]: file for file in folder.glob("*.whl")}
    for file in wheels.values():
        for needed in needed_by(file):
            name = canonicalize_name(needed.name)
            assert name == "torch" or parse_wheel_filename(wheels[name].name)[1] in needed.specifier
    assert "torch" not in wheels and "-none-any.whl" in wheels[canonicalize_name("deepspeed")].name
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        str(site),
    ]
    subprocess.run([*pip, *map(str, wheels.values())], check=True)
    imports = "import everest_ds.training.loop as loop, deepspeed; print(loop.__file__, deepspeed.__file__)"
    alone = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", imports], cwd=tmp_path, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.count(str(site)) == 2, done.stdout + done.stderr
