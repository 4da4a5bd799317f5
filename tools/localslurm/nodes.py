"""The nodes of a local cluster: sets of namespaces as root, otherwise the processes of one SLURM daemon."""

from __future__ import annotations

import os
import signal
from typing import Protocol

from localslurm.processes import alive, end, read_pid, run, start, with_environment
from localslurm.settings import Cluster

# Script of process 1 of a node, which gives the node its own host name, name resolution and shared memory. It
# keeps running after the SLURM daemon has ended.
_BOOT = """\
hostname "$NODE"; mount --bind "$FILES/hosts" /etc/hosts; mount -t tmpfs shm /dev/shm
mount --bind "$FILES/resolv.conf" /etc/resolv.conf
slurmd -D -N "$NODE" & wait $!; while :; do sleep 3600 & wait $!; done
"""


class Nodes(Protocol):
    """The interface by which nodes are started, crashed and cut off from the network."""

    def prepare(self) -> None:
        """Set up what all nodes share, before the first node starts."""

    def start(self, node: str) -> None:
        """Boot a node."""

    def crash(self, node: str) -> None:
        """Kill all processes of a node at once, as if it had lost power."""

    def partition(self, node: str) -> None:
        """Make a node unreachable."""

    def heal(self, node: str) -> None:
        """Make an unreachable node reachable again."""

    def clear(self) -> None:
        """Remove what all nodes shared, after the last node has ended."""


def nodes_of(cluster: Cluster) -> Nodes:
    """Return the kind of nodes that the cluster uses: namespaces as root, otherwise daemons on ports."""
    return RootNodes(cluster) if cluster.as_root else UserNodes(cluster)


class RootNodes:
    """Nodes with their own network, mount, process, IPC and host-name namespaces, joined by a bridge."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def prepare(self) -> None:
        """Create the network bridge that joins the nodes."""
        bridge = self.cluster.bridge
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.cluster.network}.1/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")

    def start(self, node: str) -> None:
        """Create the namespaces of a node, connect them to the bridge and start the SLURM daemon."""
        space, cable = self._names(node)
        run("ip", "netns", "add", space)
        run("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", cable, "master", self.cluster.bridge, "up")
        run("ip", "-n", space, "link", "set", "lo", "up")
        run("ip", "-n", space, "addr", "add", f"{self.cluster.address(node)}/24", "dev", "eth0")
        run("ip", "-n", space, "link", "set", "eth0", "up")
        spaces = ["unshare", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command = ["nsenter", f"--net=/run/netns/{space}", *spaces, "bash", "-c", _BOOT]
        settings = {"NODE": node, "FILES": self.cluster.folder}
        pid = start(command, self.cluster.log_file(node), settings | self.cluster.environment())
        self.cluster.pid_file(node).write_text(str(pid))

    def crash(self, node: str) -> None:
        """Kill process 1 of a node, and remove its network."""
        space, cable = self._names(node)
        # --kill-child kills process 1 of the namespace as well, and the kernel then kills all others.
        end(read_pid(self.cluster.pid_file(node)))
        self.cluster.pid_file(node).unlink(missing_ok=True)
        run("ip", "link", "del", cable, check=False)
        run("ip", "netns", "del", space, check=False)

    def partition(self, node: str) -> None:
        """Take the network interface of a node down."""
        run("ip", "link", "set", self._names(node)[1], "down")

    def heal(self, node: str) -> None:
        """Bring the network interface of a node up again."""
        run("ip", "link", "set", self._names(node)[1], "up")

    def clear(self) -> None:
        """Remove the network bridge."""
        run("ip", "link", "del", self.cluster.bridge, check=False)

    def _names(self, node: str) -> tuple[str, str]:
        """Return the names of a node's network namespace and of the host's end of its virtual cable."""
        return f"{self.cluster.tag}-{node}", f"{self.cluster.tag}v{self.cluster.number(node)}"


class UserNodes:
    """Nodes that are `slurmd` daemons on different ports and share this host's name, network and files."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def prepare(self) -> None:
        """Do nothing, because these nodes share no resources that need setting up."""

    def start(self, node: str) -> None:
        """Start the SLURM daemon of a node."""
        pid = start(
            ["slurmd", "-D", "-N", node],
            self.cluster.log_file(node),
            {"SLURMD_NODENAME": node, **self.cluster.environment()},
        )
        self.cluster.pid_file(node).write_text(str(pid))

    def crash(self, node: str) -> None:
        """Kill all processes of a node."""
        while found := self._processes(node):  # repeated, because a process may start another meanwhile
            self._signal(found, signal.SIGKILL)
        self.cluster.pid_file(node).unlink(missing_ok=True)

    def partition(self, node: str) -> None:
        """Suspend all processes of a node, which makes it unresponsive."""
        self._signal(self._processes(node), signal.SIGSTOP)

    def heal(self, node: str) -> None:
        """Continue all processes of a node."""
        self._signal(self._processes(node), signal.SIGCONT)

    def clear(self) -> None:
        """Do nothing, because these nodes share no resources that need removing."""

    def _processes(self, node: str) -> list[int]:
        """Return the process ids of a node's daemon, its step daemons and tasks, found by their variables."""
        return list(with_environment(f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.cluster.conf}"))

    def _signal(self, pids: list[int], number: int) -> None:
        for pid in filter(alive, pids):
            os.kill(pid, number)
