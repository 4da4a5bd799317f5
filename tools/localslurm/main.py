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

  up                     start the cluster and print the variables that sbatch needs:
                         eval "$(tools/local_slurm up)"
  env                    print these variables again
  status                 show the nodes, the jobs and the location of the logs
  crash NODE             cut the power of a node
  start NODE             boot a crashed node again
  partition NODE         cut the network of a node
  heal NODE              restore the network of a node
  crash slurmctld        end the controller
  start slurmctld        start the controller again
  down                   end every process; remove every file, namespace and device

As root, each node has its own network, host name and processes. As an ordinary user, each node is a daemon on
a port of this host, and `partition` suspends the node's processes instead. The packages slurmctld, slurmd,
slurm-client and munge must be installed.
"""


def main() -> None:
    """Run the command line; an error of the user is reported on one line."""
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
    parser.add_argument(
        "--dir", type=Path, default=Path(default), help="folder of the cluster (default: %(default)s)"
    )
    parser.add_argument(
        "--nodes", type=int, default=4, help="with up: number of nodes (default: %(default)s)"
    )
    parser.add_argument(
        "--gpus", type=int, default=0, help="with up: simulated GPUs on each node (default: %(default)s)"
    )
    parser.add_argument(
        "--cpus", type=int, default=4, help="with up: CPUs that each node reports (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.command in _ON_NODES and options.node is None:
        parser.error(f"{options.command}: the name of the node is missing")
    return options


def _up(options: argparse.Namespace) -> None:
    missing = control.missing_programs(as_root=os.geteuid() == 0)
    if missing:
        raise SystemExit(
            f"error: programs are missing: {', '.join(missing)};"
            " fix: apt-get install slurmctld slurmd slurm-client munge iproute2"
        )
    running = load(options.dir)
    if running is not None and control.is_up(running):
        raise SystemExit(
            f"error: a cluster is running in {options.dir}; end it with `down`, or choose another --dir"
        )
    if running is not None:
        control.down(running)
    elif options.dir.exists() and any(options.dir.iterdir()):
        raise SystemExit(
            f"error: {options.dir} contains files but no {FILE_NAME}, so it is not the folder of a cluster;"
            " choose another --dir"
        )
    cluster = design(options.dir, options.nodes, options.gpus, options.cpus)
    try:
        control.up(cluster)
    except BaseException:
        print_logs(cluster)
        control.down(cluster)
        raise
    _env(cluster, options)


def print_logs(cluster: Cluster) -> None:
    """Print the last lines of the daemons' logs on stderr, before the logs are removed."""
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
        nodes_of(cluster).crash(options.node)  # removes what an earlier crash left behind
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
