"""The store through which the ranks of a run find each other, and the network interfaces that a run uses.

Neither torch's store nor gloo nor NCCL knows a password: whoever reaches their ports can read and write the
messages of a run, some of which are pickles. For this reason nothing listens on more interfaces than the run
needs: on loopback only if all ranks are on one host, else on the address through which they meet.
"""

from __future__ import annotations

import errno
import os
import socket
from datetime import timedelta
from ipaddress import ip_address

import torch.distributed as dist

from everest_ds.launch.environment import LOCALHOST

_INTERFACES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def create_store(rank: int, num_ranks: int, one_host: bool, timeout: timedelta) -> dist.Store:
    """Connect to the run's store, which rank 0 hosts, or the agent of torchrun on all interfaces.

    Args:
        rank: this process's rank.
        num_ranks: number of ranks of the run.
        one_host: True if all ranks are on this host.
        timeout: time that the ranks have to connect.

    Raises:
        OSError, RuntimeError, ValueError: if the port is taken, or the store cannot be reached in time.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        store, *_ = next(dist.rendezvous("env://", timeout=timeout))
        return store
    address, port = LOCALHOST if one_host else os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    listener = listen_at(address, port) if rank == 0 else None
    descriptor = None if listener is None else listener.detach()  # the store closes it
    return dist.TCPStore(
        address,
        port,
        num_ranks,
        is_master=rank == 0,
        timeout=timeout,
        master_listen_fd=descriptor,
    )


def listen_at(address: str, port: int) -> socket.socket | None:
    """Listen on the interface of an address or host name; None if other hosts must reach it elsewhere.

    That is so if a name stands for loopback on its own host, as many systems' /etc/hosts has it, or if the
    address belongs to a gateway in front of this host.

    Raises:
        OSError: if the port is taken, or the name is unknown.
    """
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    for family, _, _, _, place in sorted(found):  # IPv4 first
        here = ip_address(place[0])
        if (here.is_loopback and place[0] != address) or getattr(here, "ipv4_mapped", None):
            continue
        try:
            return socket.create_server(place, family=family)
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return None


def stay_on_loopback() -> None:
    """Let the groups of this process use the loopback interface only, whatever the site prefers."""
    names = [name for _, name in socket.if_nameindex()]
    loopback = next((name for name in names if name in ("lo", "lo0")), None)
    if loopback is not None:
        os.environ.update(dict.fromkeys(_INTERFACES, loopback))
