"""The command line of `tools/local_slurm`."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable
from pathlib import Path

from localslurm import control
from localslurm.nodes import nodes_of
from localslurm.processes import run
from localslurm.settings import FILE_NAME, Cluster, design, load

DESCRIPTION = """\
A real SLURM cluster of several nodes on this Linux machine.

  up                     start it; prints the variables that sbatch needs: eval "$(tools/local_slurm up)"
  env                    print those variables again
  status                 nodes, jobs, and where the logs are
  crash NODE             the node loses power           start NODE   ... and boots again
  partition NODE         its network cable is pulled    heal NODE    ... and plugged in
  crash slurmctld        the controller ends            start slurmctld
  down                   end every process, remove every file, namespace and device

As root, a node has its own network, host name and processes. As an ordinary user, nodes are daemons on ports
of this host: partition then freezes the node's processes. Needs slurmctld, slurmd, slurm-client and munge.
"""


def main() -> None:
    """Do what the command line says; a user's mistake ends in one line and exit code 2."""
    options = _parse()
    os.environ["PATH"] = control.search_path()
    if options.command == "up":
        _up(options)
        return
    cluster = load(options.dir)
    if cluster is None:
        if options.command == "down":
            return
        raise SystemExit(f"error: no cluster in {options.dir}; start one with `up`")
    _COMMANDS[options.command](cluster, options)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "local_slurm", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["up", *_COMMANDS])
    parser.add_argument("node", nargs="?", help="node1, node2, ...")
    default = os.environ.get("LOCAL_SLURM_DIR", f"/tmp/local-slurm-{os.getuid()}")
    parser.add_argument("--dir", type=Path, default=Path(default), help="the cluster's folder (%(default)s)")
    parser.add_argument("--nodes", type=int, default=4, help="for up (%(default)s)")
    parser.add_argument("--gpus", type=int, default=0, help="pretended GPUs of a node, for up (%(default)s)")
    parser.add_argument("--cpus", type=int, default=4, help="CPUs that a node claims, for up (%(default)s)")
    options = parser.parse_args()
    if options.command in _ON_NODES and options.node is None:
        parser.error(f"{options.command}: which node?")
    return options


def _up(options: argparse.Namespace) -> None:
    missing = control.missing_programs(as_root=os.geteuid() == 0)
    if missing:
        raise SystemExit(
            f"error: not installed: {', '.join(missing)};"
            " fix: apt-get install slurmctld slurmd slurm-client munge iproute2"
        )
    running = load(options.dir)
    if running is not None and control.is_up(running):
        raise SystemExit(
            f"error: a cluster is up in {options.dir}; end it with `down`, or choose another --dir"
        )
    if running is not None:
        control.down(running)
    elif options.dir.exists() and any(options.dir.iterdir()):
        raise SystemExit(f"error: {options.dir} holds other files (no {FILE_NAME}); choose another --dir")
    cluster = design(options.dir, options.nodes, options.gpus, options.cpus)
    try:
        control.up(cluster)
    except BaseException:
        print_logs(cluster)
        control.down(cluster)
        raise
    _env(cluster, options)


def print_logs(cluster: Cluster) -> None:
    """What the daemons said, before their logs are removed."""
    import sys

    for log in sorted((cluster.path / "log").glob("*.log")):
        print(
            f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-10:], sep="\n", file=sys.stderr
        )


def _env(cluster: Cluster, options: argparse.Namespace) -> None:
    for name, value in cluster.environment().items():
        print(f"export {name}={shlex.quote(value)}")


def _status(cluster: Cluster, options: argparse.Namespace) -> None:
    print(run("sinfo", "-N", "-l", "-p", "main", check=False, environment=cluster.environment()))
    print(run("squeue", check=False, environment=cluster.environment()))
    print(f"SLURM_CONF={cluster.conf}\nlogs: {cluster.path / 'log'}")


def _down(cluster: Cluster, options: argparse.Namespace) -> None:
    control.down(cluster)


def _crash(cluster: Cluster, options: argparse.Namespace) -> None:
    if options.node == control.CONTROLLER:
        control.stop_controller(cluster)
    else:
        nodes_of(cluster).crash(options.node)


def _start(cluster: Cluster, options: argparse.Namespace) -> None:
    if options.node == control.CONTROLLER:
        control.start_controller(cluster)
    else:
        nodes_of(cluster).crash(options.node)  # what a crash left of it
        nodes_of(cluster).start(options.node)


def _partition(cluster: Cluster, options: argparse.Namespace) -> None:
    nodes_of(cluster).partition(options.node)


def _heal(cluster: Cluster, options: argparse.Namespace) -> None:
    nodes_of(cluster).heal(options.node)


_ON_NODES = ("crash", "start", "partition", "heal")
_COMMANDS: dict[str, Callable[[Cluster, argparse.Namespace], None]] = {
    "down": _down,
    "env": _env,
    "status": _status,
    "crash": _crash,
    "start": _start,
    "partition": _partition,
    "heal": _heal,
}
