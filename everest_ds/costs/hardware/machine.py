"""The speeds of ranks and links from which the cost model predicts a step.

The speeds come from data sheets or from a calibration of the machine itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import exp, log
from typing import Any

from everest_ds.costs.bottleneck import MeasuredLoading

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")  # used in a training step


@dataclass(frozen=True)
class RateCurve:
    """The attained rate as a function of problem size, interpolated linearly on logarithmic axes.

    Outside its points the curve is level: it extrapolates no gain that was not measured.

    Attributes:
        sizes: problem sizes, ascending. For products, multiply-accumulates per value moved (`intensity`); for
            attention, tokens per clip; for operators that only move memory, bytes per tensor.
        rates: floating-point operations per second (a multiply-accumulate is two), or bytes per second.
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if not self.sizes or len(self.sizes) != len(self.rates) or not ascending:
            raise ValueError(
                f"a rate curve's sizes are not ascending or do not match its rates: {self.sizes}"
            )

    def at(self, size: float) -> float:
        """Return the rate at a problem size."""
        place = bisect_left(self.sizes, size)
        if place == 0:
            return self.rates[0]
        if place == len(self.sizes):
            return self.rates[-1]
        low, high = self.sizes[place - 1 : place + 1]
        share = log(size / low) / log(high / low)
        below, above = self.rates[place - 1 : place + 1]
        return exp((1 - share) * log(below) + share * log(above))

    def scaled(self, factor: float) -> RateCurve:
        """Return the curve times `factor`, such as a peak that turns shares into rates."""
        return RateCurve(self.sizes, tuple(factor * rate for rate in self.rates))


def intensity(m: float, n: float, k: float) -> float:
    """Return multiply-accumulates per matrix value of a product of (m, k) by (k, n)."""
    return 1 / (1 / m + 1 / n + 1 / k)


@dataclass(frozen=True)
class Link:
    """A link between ranks or nodes: a message of S bytes takes latency_s + S / bytes_per_s."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float, messages: int = 1) -> float:
        """Return the time of `num_bytes` sent in `messages` messages, one after the other."""
        return messages * self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Machine:
    """One rank of a cluster, with its links to the other ranks.

    Attributes:
        device: human-readable name.
        memory_bytes: memory that a rank may use.
        asynchronous: True if the device computes while the host works and links transfer, as GPUs do: host
            work, reduction of gradients and gathering of weights hide behind compute. On a CPU nothing
            overlaps.
        peak_flops_per_s: peak rate by precision; empty if no data sheet states it.
        products: rate of matrix products over their intensity, by precision.
        attention: rate of fused attention, forward and backward, over tokens per clip, by precision.
        moving: bytes per second of operators that only move and add, over bytes per tensor, by precision.
        copy_bytes_per_s: rate at which large tensors, such as model states, are read and written.
        fresh_bytes_per_s: rate of the first write to large tensors (on a CPU, page by page).
        adam_values_per_s: parameters per second that the optimiser updates on the device.
        launch_s: host time per operator, with the Python around it.
        step_s: host time per step, besides operators and parameter tensors.
        parameter_s: host time per parameter tensor (hooks, lists of tensors) in a step of one
            micro-batch, by ZeRO stage.
        host_link: link between device and host memory.
        host_adam_values_per_s: parameters per second that the optimiser updates in host memory.
        ranks_per_node: number of ranks on a node.
        inside: a rank's link to the other ranks of its node, by collective.
        between: a node's link to other nodes, which its ranks share.
        decode_s: fixed time of one core per clip, besides the time per pixel.
        decode_pixels_per_s: video pixels per second that one core decodes, crops and scales.
        spare_cores: cores on which a rank's loader workers decode while it computes; 0 if they have none.
        threads: threads with which a rank computes on a CPU.
        baseline_bytes: memory that a rank holds besides its model; counted on a CPU only.
        watts: power of a rank's share of its node under load; None if unknown.
        source: human-readable origin of the numbers.
        loading: measured loading of the run's own clips, which replaces the decoding rate; None if there is
            none.
    """

    device: str
    memory_bytes: int
    asynchronous: bool
    peak_flops_per_s: Mapping[str, float]
    products: Mapping[str, RateCurve]
    attention: Mapping[str, RateCurve]
    moving: Mapping[str, RateCurve]
    copy_bytes_per_s: float
    fresh_bytes_per_s: float
    adam_values_per_s: float
    launch_s: float
    step_s: float
    parameter_s: Mapping[int, float]
    host_link: Link
    host_adam_values_per_s: float
    ranks_per_node: int
    inside: Mapping[str, Link]
    between: Link
    decode_s: float
    decode_pixels_per_s: float
    spare_cores: float
    threads: int = 0
    baseline_bytes: int = 0
    watts: float | None = None
    source: str = ""
    loading: MeasuredLoading | None = None

    @property
    def precisions(self) -> tuple[str, ...]:
        """Return the precisions that the machine has rates for."""
        return tuple(self.products)

    def as_json(self) -> dict[str, Any]:
        """Return the machine as a JSON tree, which `from_json` reads back except for `loading`."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Machine:
        """Return the machine that `as_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: the tree is not a machine.
        """
        values = {each.name: tree[each.name] for each in fields(cls) if each.name != "loading"}
        for name in ("products", "attention", "moving"):
            values[name] = {
                key: RateCurve(tuple(curve["sizes"]), tuple(curve["rates"]))
                for key, curve in values[name].items()
            }
        values["inside"] = {name: Link(**link) for name, link in values["inside"].items()}
        values["parameter_s"] = {int(stage): value for stage, value in values["parameter_s"].items()}
        for name in ("host_link", "between"):
            values[name] = Link(**values[name])
        return cls(**values)


def level(rate: float) -> RateCurve:
    """Return a curve with the same rate at every size."""
    return RateCurve((1.0,), (rate,))


def same_link(link: Link) -> dict[str, Link]:
    """Return a mapping of every collective to the same link."""
    return dict.fromkeys(COLLECTIVES, link)
