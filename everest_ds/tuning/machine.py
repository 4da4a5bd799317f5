"""What ranks and links can do: the numbers that the cost model of a step is made of.

Built from data sheets, or from a calibration of the machine itself.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import exp, log
from typing import Any

COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")  # those of a training step


@dataclass(frozen=True)
class RateCurve:
    """Attained rate over the size of a problem: straight lines between points, both axes logarithmic.

    Outside of its points the curve goes on level: it promises nothing that was not measured.

    Attributes:
        sizes: ascending. Of products the multiply-accumulates for each value that is moved (`intensity`), of
            attention the tokens of a clip, of operators that only move memory the bytes of a tensor.
        rates: floating-point operations a second, two for a multiply-accumulate; or bytes a second.
    """

    sizes: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in zip(self.sizes, self.sizes[1:], strict=False))
        if not self.sizes or len(self.sizes) != len(self.rates) or not ascending:
            raise ValueError("a rate curve needs points of ascending size")

    def at(self, size: float) -> float:
        """The rate at a size."""
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
        """The same curve, `factor` times as high: from shares of a peak to rates."""
        return RateCurve(self.sizes, tuple(factor * rate for rate in self.rates))


def intensity(m: float, n: float, k: float) -> float:
    """Multiply-accumulates of a product (m, k) by (k, n) for each value of its three matrices."""
    return 1 / (1 / m + 1 / n + 1 / k)


@dataclass(frozen=True)
class Link:
    """A way from one rank (or node) to another: a message of S bytes takes latency + S / bytes_per_s."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, num_bytes: float, messages: int = 1) -> float:
        """`num_bytes` in so many messages, one after the other."""
        return messages * self.latency_s + num_bytes / self.bytes_per_s


@dataclass(frozen=True)
class Machine:
    """One rank of a cluster, and its ways to the others.

    Attributes:
        device: name, for people.
        memory_bytes: what a rank may use.
        asynchronous: the device computes beside the host and beside its links, as GPUs do: the host's work,
            reduction of gradients and gathering of weights hide behind compute. On a CPU all stand in a row.
        peak_flops_per_s: by precision; empty where no data sheet says.
        products: attained by matrix products over their intensity, by precision.
        attention: attained by fused attention, both ways, over the tokens of a clip, by precision.
        moving: bytes a second of a model's operators that only move and add, over the bytes of a tensor.
        copy_bytes_per_s: of large tensors that are read and written, such as states.
        fresh_bytes_per_s: of large tensors that are written for the first time: on a CPU, page by page.
        adam_values_per_s: parameters that the optimiser steps on the device.
        launch_s: the host's time for one operator, with the Python around it.
        step_s: the host's own time for a step, beside operators and tensors.
        parameter_s: the host's for each tensor of parameters (hooks, lists of tensors) in a step of one
            micro-batch, by ZeRO stage.
        host_link: between device and host memory.
        host_adam_values_per_s: parameters that the optimiser steps in host memory.
        ranks_per_node: R.
        inside: a rank's link to the others of its node, by collective.
        between: a node's link to other nodes, which its ranks share.
        decode_s: one core's time for a clip, beside that for its frames.
        decode_pixels_per_s: pixels of a video that one core decodes, crops and scales.
        spare_cores: with which a rank's workers decode while it computes; 0 if they are the same.
        threads: with which a rank computes, where that is on its host.
        baseline_bytes: what a rank holds beside its model, where that counts: on a CPU.
        watts: of a rank's share of its node, under load; None if unknown.
        source: where the numbers come from, for people.
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

    @property
    def precisions(self) -> tuple[str, ...]:
        """Those that it has rates for."""
        return tuple(self.products)

    def as_json(self) -> dict[str, Any]:
        """For a file; `from_json` reads it."""
        return asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Machine:
        """The machine that `as_json` wrote.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        values = {each.name: tree[each.name] for each in fields(cls)}
        for name in ("products", "attention", "moving"):
            values[name] = {key: _curve(curve) for key, curve in values[name].items()}
        values["inside"] = {name: Link(**link) for name, link in values["inside"].items()}
        values["parameter_s"] = {int(stage): value for stage, value in values["parameter_s"].items()}
        for name in ("host_link", "between"):
            values[name] = Link(**values[name])
        return cls(**values)


def level(rate: float) -> RateCurve:
    """The same rate at every size, where nothing says that they differ."""
    return RateCurve((1.0,), (rate,))


def same_link(link: Link) -> dict[str, Link]:
    """One link for every collective, where nothing says that they differ."""
    return dict.fromkeys(COLLECTIVES, link)


def _curve(tree: Mapping[str, Sequence[float]]) -> RateCurve:
    return RateCurve(tuple(tree["sizes"]), tuple(tree["rates"]))
