"""Starting and stopping a local cluster: its files, its controller and its authentication daemon."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from pathlib import Path

from localslurm import conf
from localslurm.nodes import nodes_of
from localslurm.processes import alive, end, read_pid, run, wait_until, with_environment
from localslurm.settings import Cluster

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
CONTROLLER = "slurmctld"


def missing_programs(as_root: bool) -> list[str]:
    """Return the programs that must be installed before a cluster can start."""
    wanted = (*PROGRAMS, "ip", "nsenter", "unshare") if as_root else PROGRAMS
    return [name for name in wanted if shutil.which(name, path=search_path()) is None]


def search_path() -> str:
    """Return PATH extended by the folders of system daemons, which an ordinary user's PATH often lacks."""
    return f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


def up(cluster: Cluster) -> None:
    """Start all daemons of a cluster and wait until every node is idle."""
    _write_files(cluster)
    cluster.save()
    _start_munge(cluster)
    nodes = nodes_of(cluster)
    nodes.prepare()
    start_controller(cluster, clean=True)
    for node in cluster.nodes:
        nodes.start(node)
    wait_until(lambda: states(cluster).count("idle") == cluster.num_nodes, 30, "the nodes did not come up")


def down(cluster: Cluster) -> None:
    """End all processes of a cluster and remove its folder."""
    stop_controller(cluster)
    nodes = nodes_of(cluster)
    for node in cluster.nodes:
        nodes.crash(node)
    nodes.clear()
    end(read_pid(cluster.pid_file("munged")), signal.SIGTERM)
    for pid in with_environment(f"SLURM_CONF={cluster.conf}", "LOCAL_SLURM=daemon"):
        end(pid)
    shutil.rmtree(cluster.path)


def start_controller(cluster: Cluster, clean: bool = False) -> None:
    """Start slurmctld, with an empty queue (`clean`) or the queue that it saved."""
    run(
        CONTROLLER, *(["-c"] if clean else []), environment={**cluster.environment(), "LOCAL_SLURM": "daemon"}
    )
    wait_until(lambda: bool(states(cluster)), 20, "slurmctld did not answer")


def stop_controller(cluster: Cluster) -> None:
    """End slurmctld with SIGTERM, as a service manager does, so that it saves the queue."""
    end(read_pid(cluster.pid_file(CONTROLLER)), signal.SIGTERM)


def states(cluster: Cluster) -> list[str]:
    """Return SLURM's state of each node, or an empty list if the controller does not answer."""
    said = run("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False, environment=cluster.environment())
    return said.split()


def is_up(cluster: Cluster) -> bool:
    """Return whether the controller of the cluster is running."""
    pid = read_pid(cluster.pid_file(CONTROLLER))
    return pid is not None and alive(pid)


def _write_files(cluster: Cluster) -> None:
    for name in ("state", "log", "run", "dev"):
        (cluster.path / name).mkdir(parents=True)
    for node in cluster.nodes:
        (cluster.path / "spool" / node).mkdir(parents=True)
        (cluster.path / "tmp" / node).mkdir(parents=True)
    for number in range(cluster.gpus):  # SLURM requires a character device for each GPU
        (cluster.path / "dev" / f"gpu{number}").symlink_to("/dev/null")
    cluster.conf.write_text(conf.slurm_conf(cluster))
    (cluster.path / "gres.conf").write_text(conf.gres_conf(cluster))
    (cluster.path / "hosts").write_text(conf.hosts(cluster))
    # No name server is reachable from a node, and an address that refuses connections fails without delay.
    (cluster.path / "resolv.conf").write_text("nameserver 127.0.0.1\n")


def _start_munge(cluster: Cluster) -> None:
    """Start a munged for this cluster only, without touching a service, user or key of the machine."""
    os.chmod(cluster.path, 0o755)
    folder = cluster.path / "run"
    os.chmod(folder, 0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    files = {
        "key-file": key,
        "socket": folder / "munge.socket",
        "pid-file": cluster.pid_file("munged"),
        "log-file": cluster.log_file("munged"),
        "seed-file": folder / "munge.seed",
    }
    run("munged", "--force", *(f"--{name}={path}" for name, path in files.items()))
    wait_until(Path(files["socket"]).exists, 5, "munged did not start")
