"""What links between GPUs, hosts and nodes carry: one table, with sources.

Latencies are those that NCCL reckons with for a step of a ring (`hwLat`, protocol Simple, in its
src/graph/tuning.cc); sockets are not in it, and their latency here is an order of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

from everest_ds.errors import UsageError, nearest

_NVLINK_US, _PCIE_US, _NETWORK_US, _SOCKET_US = 3.4, 5.7, 14.0, 50.0


@dataclass(frozen=True)
class LinkKind:
    """One kind of link.

    Attributes:
        gb_per_s: one direction of what one GPU or one network adapter has, 10^9 bytes a second, by its maker.
        latency_us: of one message.
        attained: share of `gb_per_s` that large messages get.
        source: of both.
    """

    gb_per_s: float
    latency_us: float
    attained: float
    source: str

    @property
    def bytes_per_s(self) -> float:
        """What large messages get, one direction."""
        return self.gb_per_s * self.attained * 1e9

    @property
    def latency_s(self) -> float:
        """Seconds of one message without content."""
        return self.latency_us * 1e-6


# 370 of 450 GB/s: NCCL's maintainer on the protocol's overhead, NVIDIA/nccl-tests#212.
_NCCL_SHARE = 0.82
# 26 GB/s of PCIe 4's 31.5: NVIDIA's own bandwidthTest, and its GPUDirect guide.
_PCIE_SHARE = 0.82
# 23 of 25 GB/s with RDMA; sockets take a core for a few GB/s.
_RDMA_SHARE, _SOCKET_SHARE = 0.92, 0.8


def _nvlink(links: int, gb_per_s: float) -> LinkKind:
    source = f"{links} links of {gb_per_s:g} GB/s a direction; NCCL's share: NVIDIA/nccl-tests#212"
    return LinkKind(links * gb_per_s, _NVLINK_US, _NCCL_SHARE, source)


def _pcie(generation: int, gb_per_s: float) -> LinkKind:
    return LinkKind(gb_per_s, _PCIE_US, _PCIE_SHARE, f"PCI-SIG: generation {generation}, 16 lanes")


def _rdma(name: str, gbit_per_s: int) -> LinkKind:
    return LinkKind(gbit_per_s / 8, _NETWORK_US, _RDMA_SHARE, f"{name}: {gbit_per_s} Gbit/s a port")


def _ethernet(gbit_per_s: int) -> LinkKind:
    source = f"IEEE 802.3: {gbit_per_s} Gbit/s a port; share and latency of sockets are ours"
    return LinkKind(gbit_per_s / 8, _SOCKET_US, _SOCKET_SHARE, source)


# Inside a node: what one GPU has.
LINKS: dict[str, LinkKind] = {
    "nvlink2": _nvlink(6, 25),
    "nvlink3": _nvlink(12, 25),
    "nvlink4": _nvlink(18, 25),
    "nvlink5": _nvlink(18, 50),
    "infinity-fabric": LinkKind(
        448, _NVLINK_US, _NCCL_SHARE, "AMD MI300X data sheet: 7 links of 64 GB/s a direction; share of NVLink"
    ),
    "pcie3": _pcie(3, 15.75),
    "pcie4": _pcie(4, 31.5),
    "pcie5": _pcie(5, 63.0),
}

# Between nodes: what one adapter has.
INTERCONNECTS: dict[str, LinkKind] = {
    "ib-edr": _rdma("InfiniBand EDR", 100),
    "ib-hdr": _rdma("InfiniBand HDR", 200),
    "ib-ndr": _rdma("InfiniBand NDR", 400),
    "roce-100": _rdma("RoCE v2", 100),
    "roce-200": _rdma("RoCE v2", 200),
    "roce-400": _rdma("RoCE v2", 400),
    "ethernet-10": _ethernet(10),
    "ethernet-25": _ethernet(25),
    "ethernet-100": _ethernet(100),
}


@dataclass(frozen=True)
class Interconnect:
    """How the nodes of a cluster are joined: so many adapters a node, of one kind."""

    kind: LinkKind
    adapters: int

    @property
    def bytes_per_s(self) -> float:
        """Of a whole node, one direction."""
        return self.adapters * self.kind.bytes_per_s


def find_interconnect(text: str) -> Interconnect:
    """`ib-ndr` (one adapter a node) or `8xib-ndr`.

    Raises:
        UsageError: no such kind, or no number of adapters.
    """
    count, times, name = text.lower().rpartition("x")
    if not times or not (count.isdigit() and int(count)):
        count, name = "1", text.lower()
    if name not in INTERCONNECTS:
        raise UsageError("--interconnect", given=repr(text), allowed=nearest(name, INTERCONNECTS))
    return Interconnect(INTERCONNECTS[name], int(count))
