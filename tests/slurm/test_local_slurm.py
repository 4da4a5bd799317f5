"""Tests of tools/local_slurm: as root and as an ordinary user, it ends everything that it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import TOOL, LocalCluster, run, wait_for

# The `cluster` fixture skips these tests on machines that cannot start a cluster.
pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("cluster")]

AS_NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def traces(folder: Path) -> list[str]:
    """List the mounts, processes and files that a cluster in `folder` left on this machine."""
    found = [line for line in Path("/proc/mounts").read_text().splitlines() if str(folder) in line]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(folder).encode() in (process / "environ").read_bytes()
                and (process / "cmdline").read_bytes()
            ):
                found.append((process / "cmdline").read_text())
        except OSError:
            continue
    return found + ([str(folder)] if folder.exists() else [])


def devices(local: LocalCluster) -> list[str]:
    """Return the name prefix of a cluster's network devices, then its devices and namespaces."""
    address = (local.folder / "hosts").read_text().splitlines()[1].split()[0]
    listed = run(["ip", "-o", "addr"], local.variables).splitlines()
    (bridge,) = (line.split()[1] for line in listed if f" {address}/" in line)
    return [bridge.removesuffix("b"), *named(bridge.removesuffix("b"))]


def named(prefix: str) -> list[str]:
    links = [path.name for path in Path("/sys/class/net").iterdir()]
    spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout.split()
    return [name for name in links + spaces if name.startswith(prefix)]


def test_a_cluster_comes_breaks_and_goes_without_a_trace(tmp_path: Path) -> None:
    local = LocalCluster(tmp_path / "other")
    local.tool("up", "--nodes", "2", "--gpus", "2")
    try:
        names = local.slurm(
            "srun", "--nodes=2", "--gpus-per-node=2", "bash", "-c", "echo $(hostname) $SLURM_GPUS_ON_NODE"
        )
        assert sorted(names.splitlines()) == ["node1 2", "node2 2"]
        local.tool("crash", "node1")
        wait_for(lambda: "down*" in local.slurm("sinfo", "-h", "-o", "%T"), "node1 is down", 15)
        prefix, *found = devices(local)
        assert len(found) == 3  # the bridge, and the cable and namespace of node2
    finally:
        local.tool("down")
    assert traces(local.folder) == [] and named(prefix) == []


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder of user 65534, who may not enter pytest's own temporary folders."""
    folder = Path(tempfile.mkdtemp(prefix="local-slurm-", dir="/tmp"))
    os.chown(folder, 65534, 65534)
    yield folder
    shutil.rmtree(folder)


def test_an_ordinary_user_gets_one_too(open_folder: Path) -> None:
    if subprocess.run([*AS_NOBODY, "test", "-r", str(TOOL)], capture_output=True).returncode:
        pytest.skip(f"user nobody cannot read {TOOL}")
    folder = open_folder / "cluster"
    variables = {**os.environ, "HOME": str(open_folder), "PYTHONDONTWRITEBYTECODE": "1"}

    def tool(*arguments: str) -> str:
        return run([*AS_NOBODY, str(TOOL), *arguments, "--dir", str(folder)], variables)

    exports = tool("up", "--nodes", "2")
    try:
        client = {
            **variables,
            **dict(line.removeprefix("export ").split("=") for line in exports.splitlines()),
        }
        said = run(
            [*AS_NOBODY, "srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME $MASTER_ADDR"], client
        )
        assert sorted(said.splitlines()) == ["node1 127.0.0.1", "node2 127.0.0.1"]
        tool("partition", "node2")
        wait_for(lambda: "down*" in run(["sinfo", "-h", "-o", "%T"], client), "node2 is down", 15)
    finally:
        tool("down")
    assert traces(folder) == []
