"""Tests of what a run listens on: a run on one host can be reached from that host only."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from contextlib import suppress
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest

from everest_ds.launch.environment import LOCALHOST, free_port
from everest_ds.parallel.rendezvous import listen_at
from everest_ds.parallel.world import World, join_world, leave_world
from tests.ranks import run_ranks

_LISTENING = "0A"  # the state in /proc/net/tcp
_ADDRESS_OF_INTERFACE = 0x8915  # SIOCGIFADDR of <linux/sockios.h>


def _open_to_others() -> list[str]:
    """Return the address and port of each socket on which this process listens beyond loopback."""
    own = {os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()}
    places = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTENING and f"socket:[{fields[9]}]" in own:
                places.append(_decoded(fields[1]))
    assert places, "a rank listens for the others at least in gloo"
    return [place for place in places if not place.startswith("127.")]


def _decoded(place: str) -> str:
    """Decode an address of /proc/net/tcp, which has the bytes of each 32-bit word in reverse order."""
    text, port = place.split(":")
    words = [bytes.fromhex(text[at : at + 8])[::-1] for at in range(0, len(text), 8)]
    return f"{ip_address(b''.join(words))}:{int(port, 16)}"


def _network() -> tuple[str, str]:
    """Return the name and the IPv4 address of an interface of this machine other than loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the system chooses an interface
        except OSError:
            pytest.skip("this machine has no network beside loopback")
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            with suppress(OSError):  # an interface without an address
                if fcntl.ioctl(probe, _ADDRESS_OF_INTERFACE, request)[20:24] == socket.inet_aton(address):
                    return name, address
    raise AssertionError(f"no interface has the address {address}")


def join_again(world: World, port: int, interface: str, address: str, hosts: int) -> list[str]:
    """Join a world from `hosts` hosts at a site that prefers an interface; return what others can reach."""
    os.environ.update(
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME=interface,
        LOCAL_WORLD_SIZE=str(world.size // hosts),
        LOCAL_RANK=str(world.rank % (world.size // hosts)),
    )
    leave_world()
    again = join_world(timedelta(seconds=60))
    assert again.gather(again.rank) == list(range(again.size))
    found = _open_to_others()
    again.barrier()
    leave_world()
    return found


def test_a_run_on_one_host_listens_on_loopback_only() -> None:
    name, address = _network()
    assert run_ranks(join_again, 2, free_port(), name, address, 1) == [[], []]


def test_a_run_on_two_hosts_listens_on_the_given_address_only() -> None:
    name, address = _network()
    places = run_ranks(join_again, 2, port := free_port(), name, address, 2)
    assert f"{address}:{port}" in places[0]
    hosts = {place.rpartition(":")[0] for rank in places for place in rank}
    assert not hosts & {"0.0.0.0", "::"}


@pytest.mark.parametrize("address", ["localhost", "203.0.113.7"])
def test_a_store_that_others_reach_elsewhere_listens_everywhere(address: str) -> None:
    assert listen_at(address, free_port()) is None


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server((LOCALHOST, 0)) as taken, pytest.raises(OSError, match="in use"):
        listen_at(LOCALHOST, taken.getsockname()[1])
