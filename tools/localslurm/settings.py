"""What a local cluster is: its size, where it lives, and the addresses and names derived from that."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

FILE_NAME = "cluster.json"


@dataclass(frozen=True)
class Cluster:
    """One cluster, in one folder.

    Attributes:
        as_root: every node is a set of namespaces with its own address, host name and processes. Without
            root, nodes are SLURM daemons on different ports of this host.
        ports: of the controller, then of each node; as root the same for all, for addresses differ.
    """

    folder: str
    num_nodes: int
    gpus: int
    cpus: int
    as_root: bool
    ports: tuple[int, ...]

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def nodes(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]

    @property
    def conf(self) -> Path:
        return self.path / "slurm.conf"

    @property
    def tag(self) -> str:
        """Short enough for a network interface, different for clusters in different folders."""
        return "ls" + hashlib.sha256(self.folder.encode()).hexdigest()[:6]

    @property
    def bridge(self) -> str:
        return f"{self.tag}b"

    @property
    def network(self) -> str:
        """The first three numbers of the cluster's addresses."""
        digest = hashlib.sha256(self.folder.encode()).digest()
        return f"10.{100 + digest[0] % 100}.{digest[1]}"

    @property
    def controller_address(self) -> str:
        return f"{self.network}.1" if self.as_root else "127.0.0.1"

    @property
    def host(self) -> str:
        return socket.gethostname().partition(".")[0]

    def address(self, node: str) -> str:
        return f"{self.network}.{10 + self.number(node)}" if self.as_root else "127.0.0.1"

    def port(self, node: str) -> int:
        return self.ports[self.number(node)]

    def number(self, node: str) -> int:
        """1 for node1. Ends the program if there is no such node."""
        if node not in self.nodes:
            raise SystemExit(f"error: no node {node}; allowed: {', '.join(self.nodes)}")
        return int(node.removeprefix("node"))

    def pid_file(self, name: str) -> Path:
        return self.path / "run" / f"{name}.pid"

    def log_file(self, name: str) -> Path:
        return self.path / "log" / f"{name}.log"

    def environment(self) -> dict[str, str]:
        """What clients need: `sbatch` finds the cluster by it, ranks find each other."""
        variables = {"SLURM_CONF": str(self.conf)}
        # Without root the nodes' names are SLURM's alone: no resolver knows them.
        return variables if self.as_root else variables | {"MASTER_ADDR": "127.0.0.1"}

    def save(self) -> None:
        (self.path / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")


def design(folder: Path, num_nodes: int, gpus: int, cpus: int) -> Cluster:
    """A cluster for this user, on ports that are free now."""
    as_root = os.geteuid() == 0
    controller, *nodes = _free_ports(num_nodes + 1)
    ports = (controller, *([6818] * num_nodes if as_root else nodes))
    return Cluster(str(folder.resolve()), num_nodes, gpus, cpus, as_root, ports)


def load(folder: Path) -> Cluster | None:
    """The cluster that is up in `folder`."""
    file = folder.resolve() / FILE_NAME
    if not file.is_file():
        return None
    tree = json.loads(file.read_text())
    return Cluster(**{**tree, "ports": tuple(tree["ports"])})


def _free_ports(count: int) -> tuple[int, ...]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return tuple(probe.getsockname()[1] for probe in probes)
    finally:
        for probe in probes:
            probe.close()
