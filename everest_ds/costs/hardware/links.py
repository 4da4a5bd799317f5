"""Bandwidth and latency of the links between GPUs, hosts and nodes: one table, with sources.

Latencies are the ones that NCCL assumes for one step of a ring (`hwLat`, protocol Simple, in its
src/graph/tuning.cc). NCCL lists no latency for sockets; the value here is an order of magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

from everest_ds.errors import UsageError, nearest

_NVLINK_US, _PCIE_US, _NETWORK_US, _SOCKET_US = 3.4, 5.7, 14.0, 50.0


@dataclass(frozen=True)
class LinkKind:
    """One kind of link: its nominal bandwidth, its latency and the share of the bandwidth that is attained.

    Attributes:
        gb_per_s: vendor's bandwidth per GPU or network adapter in one direction, 10^9 bytes per second.
        latency_us: latency of one message, in microseconds.
        attained: share of `gb_per_s` that large messages attain.
        source: the origin of the figures.
    """

    gb_per_s: float
    latency_us: float
    attained: float
    source: str

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth that large messages attain in one direction, in bytes per second."""
        return self.gb_per_s * self.attained * 1e9

    @property
    def latency_s(self) -> float:
        """Latency of one empty message, in seconds."""
        return self.latency_us * 1e-6


# 370 of 450 GB/s, as NCCL's maintainer explains the protocol's overhead in NVIDIA/nccl-tests#212.
_NCCL_SHARE = 0.82
# 26 of PCIe 4's 31.5 GB/s, by NVIDIA's bandwidthTest and its GPUDirect guide.
_PCIE_SHARE = 0.82
# RDMA attains 23 of 25 GB/s; with sockets, a CPU core handles only a few GB/s.
_RDMA_SHARE, _SOCKET_SHARE = 0.92, 0.8


def _nvlink(links: int, gb_per_s: float) -> LinkKind:
    source = f"{links} links of {gb_per_s:g} GB/s per direction; attained share: NVIDIA/nccl-tests#212"
    return LinkKind(links * gb_per_s, _NVLINK_US, _NCCL_SHARE, source)


def _pcie(generation: int, gb_per_s: float) -> LinkKind:
    return LinkKind(gb_per_s, _PCIE_US, _PCIE_SHARE, f"PCI-SIG: generation {generation}, 16 lanes")


def _rdma(name: str, gbit_per_s: int) -> LinkKind:
    return LinkKind(gbit_per_s / 8, _NETWORK_US, _RDMA_SHARE, f"{name}: {gbit_per_s} Gbit/s per port")


def _ethernet(gbit_per_s: int) -> LinkKind:
    source = f"IEEE 802.3: {gbit_per_s} Gbit/s per port; socket share and latency are our own estimates"
    return LinkKind(gbit_per_s / 8, _SOCKET_US, _SOCKET_SHARE, source)


# Links inside a node, per GPU.
LINKS: dict[str, LinkKind] = {
    "nvlink2": _nvlink(6, 25),
    "nvlink3": _nvlink(12, 25),
    "nvlink4": _nvlink(18, 25),
    "nvlink5": _nvlink(18, 50),
    "infinity-fabric": LinkKind(
        448,
        _NVLINK_US,
        _NCCL_SHARE,
        "AMD MI300X data sheet: 7 links of 64 GB/s per direction; attained share taken from NVLink",
    ),
    "pcie3": _pcie(3, 15.75),
    "pcie4": _pcie(4, 31.5),
    "pcie5": _pcie(5, 63.0),
}

# Links between nodes, per network adapter.
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
    """The network between the nodes of a cluster: the number of adapters per node and their kind."""

    kind: LinkKind
    adapters: int

    @property
    def bytes_per_s(self) -> float:
        """Bandwidth of a whole node in one direction, in bytes per second."""
        return self.adapters * self.kind.bytes_per_s


def find_interconnect(text: str) -> Interconnect:
    """Parse an interconnect such as `ib-ndr` (one adapter per node) or `8xib-ndr` (eight).

    Raises:
        UsageError: the kind is unknown, or the number of adapters is not a positive integer.
    """
    count, times, name = text.lower().rpartition("x")
    if not times or not (count.isdigit() and int(count)):
        count, name = "1", text.lower()
    if name not in INTERCONNECTS:
        raise UsageError(
            "--interconnect names no known network", given=repr(text), allowed=nearest(name, INTERCONNECTS)
        )
    return Interconnect(INTERCONNECTS[name], int(count))
