"""The life of one node: as root a set of namespaces, otherwise the processes of one SLURM daemon."""

from __future__ import annotations

import os
import signal
from typing import Protocol

from localslurm.processes import alive, end, read_pid, run, start, with_environment
from localslurm.settings import Cluster

# Process 1 of a node: host name, addresses and shared memory of its own; stays when the SLURM daemon ends.
_BOOT = """\
hostname "$NODE"; mount --bind "$FILES/hosts" /etc/hosts; mount -t tmpfs shm /dev/shm
mount --bind "$FILES/resolv.conf" /etc/resolv.conf
slurmd -D -N "$NODE" & wait $!; while :; do sleep 3600 & wait $!; done
"""


class Nodes(Protocol):
    """How nodes are started, lost and cut off."""

    def prepare(self) -> None:
        """Before the first node starts."""

    def start(self, node: str) -> None:
        """Boot it."""

    def crash(self, node: str) -> None:
        """Everything on it ends at once, without a word."""

    def partition(self, node: str) -> None:
        """It lives on, but nobody reaches it."""

    def heal(self, node: str) -> None:
        """It is reached again."""

    def clear(self) -> None:
        """After the last node is gone."""


def nodes_of(cluster: Cluster) -> Nodes:
    return RootNodes(cluster) if cluster.as_root else UserNodes(cluster)


class RootNodes:
    """Each node in its own network, mount, process, IPC and host-name namespaces, joined by a bridge."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def prepare(self) -> None:
        bridge = self.cluster.bridge
        run("ip", "link", "add", bridge, "type", "bridge")
        run("ip", "addr", "add", f"{self.cluster.network}.1/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")

    def start(self, node: str) -> None:
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
        space, cable = self._names(node)
        end(read_pid(self.cluster.pid_file(node)))  # its process 1 goes with it, and all others with that
        self.cluster.pid_file(node).unlink(missing_ok=True)
        run("ip", "link", "del", cable, check=False)
        run("ip", "netns", "del", space, check=False)

    def partition(self, node: str) -> None:
        run("ip", "link", "set", self._names(node)[1], "down")

    def heal(self, node: str) -> None:
        run("ip", "link", "set", self._names(node)[1], "up")

    def clear(self) -> None:
        run("ip", "link", "del", self.cluster.bridge, check=False)

    def _names(self, node: str) -> tuple[str, str]:
        """Of the network namespace, and of the host's end of its cable."""
        return f"{self.cluster.tag}-{node}", f"{self.cluster.tag}v{self.cluster.number(node)}"


class UserNodes:
    """Each node one `slurmd` on a port of its own; all share this host's name, network and files."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def prepare(self) -> None:
        pass

    def start(self, node: str) -> None:
        pid = start(
            ["slurmd", "-D", "-N", node],
            self.cluster.log_file(node),
            {"SLURMD_NODENAME": node, **self.cluster.environment()},
        )
        self.cluster.pid_file(node).write_text(str(pid))

    def crash(self, node: str) -> None:
        while found := self._processes(node):  # a process may start another while we look
            self._signal(found, signal.SIGKILL)
        self.cluster.pid_file(node).unlink(missing_ok=True)

    def partition(self, node: str) -> None:
        self._signal(self._processes(node), signal.SIGSTOP)

    def heal(self, node: str) -> None:
        self._signal(self._processes(node), signal.SIGCONT)

    def clear(self) -> None:
        pass

    def _processes(self, node: str) -> list[int]:
        """The daemon, its step daemons and their tasks: all inherit these."""
        return list(with_environment(f"SLURMD_NODENAME={node}", f"SLURM_CONF={self.cluster.conf}"))

    def _signal(self, pids: list[int], number: int) -> None:
        for pid in filter(alive, pids):
            os.kill(pid, number)
