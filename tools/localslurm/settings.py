"""The settings of a local cluster: its size, its folder, and the addresses and names derived from them."""

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
    """The settings of one cluster, stored in its folder.

    Attributes:
        folder: folder of the cluster's files.
        num_nodes: number of nodes.
        gpus: simulated GPUs on each node.
        cpus: CPUs that each node reports to SLURM.
        as_root: True if every node is a set of namespaces with its own address, host name and processes.
            Without root, nodes are SLURM daemons on different ports of this host.
        ports: port of the controller, then of each node; as root all nodes use the same port, because their
            addresses differ.
    """

    folder: str
    num_nodes: int
    gpus: int
    cpus: int
    as_root: bool
    ports: tuple[int, ...]

    @property
    def path(self) -> Path:
        """The folder of the cluster."""
        return Path(self.folder)

    @property
    def nodes(self) -> list[str]:
        """The names of the nodes: node1, node2, ..."""
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]

    @property
    def conf(self) -> Path:
        """The path of slurm.conf."""
        return self.path / "slurm.conf"

    @property
    def tag(self) -> str:
        """A prefix for names of network interfaces, which differs between clusters in different folders."""
        return "ls" + hashlib.sha256(self.folder.encode()).hexdigest()[:6]

    @property
    def bridge(self) -> str:
        """The name of the network bridge that joins the nodes."""
        return f"{self.tag}b"

    @property
    def network(self) -> str:
        """The first three numbers of the cluster's IPv4 addresses."""
        digest = hashlib.sha256(self.folder.encode()).digest()
        return f"10.{100 + digest[0] % 100}.{digest[1]}"

    @property
    def controller_address(self) -> str:
        """The IPv4 address of the controller."""
        return f"{self.network}.1" if self.as_root else "127.0.0.1"

    @property
    def host(self) -> str:
        """The short name of this host."""
        return socket.gethostname().partition(".")[0]

    def address(self, node: str) -> str:
        """Return the IPv4 address of a node."""
        return f"{self.network}.{10 + self.number(node)}" if self.as_root else "127.0.0.1"

    def port(self, node: str) -> int:
        """Return the port of a node's SLURM daemon."""
        return self.ports[self.number(node)]

    def number(self, node: str) -> int:
        """Return the number of a node (1 for node1), or end this program if there is no such node."""
        if node not in self.nodes:
            raise SystemExit(f"error: no node {node}; allowed: {', '.join(self.nodes)}")
        return int(node.removeprefix("node"))

    def pid_file(self, name: str) -> Path:
        """Return the path of the file with the process id of a daemon or node."""
        return self.path / "run" / f"{name}.pid"

    def log_file(self, name: str) -> Path:
        """Return the path of the log of a daemon or node."""
        return self.path / "log" / f"{name}.log"

    def environment(self) -> dict[str, str]:
        """Return the variables by which sbatch finds the cluster, and ranks find each other."""
        variables = {"SLURM_CONF": str(self.conf)}
        # Without root, only SLURM knows the names of the nodes, so ranks cannot resolve them.
        return variables if self.as_root else variables | {"MASTER_ADDR": "127.0.0.1"}

    def save(self) -> None:
        """Write the settings to the cluster's folder."""
        (self.path / FILE_NAME).write_text(json.dumps(asdict(self), indent=2) + "\n")


def design(folder: Path, num_nodes: int, gpus: int, cpus: int) -> Cluster:
    """Choose the settings of a new cluster for this user, with ports that are unused now."""
    as_root = os.geteuid() == 0
    controller, *nodes = _free_ports(num_nodes + 1)
    ports = (controller, *([6818] * num_nodes if as_root else nodes))
    return Cluster(str(folder.resolve()), num_nodes, gpus, cpus, as_root, ports)


def load(folder: Path) -> Cluster | None:
    """Read the settings of the cluster in `folder`, or return None if there is none."""
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
