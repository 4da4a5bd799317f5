"""Fit of a `Machine` to the measurements of ranks that worked at the same time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, log, log2
from statistics import fmean
from typing import NamedTuple

from everest_ds.config.schema import Experiment
from everest_ds.costs.hardware.machine import COLLECTIVES, Link, Machine, RateCurve, intensity, same_link
from everest_ds.costs.host_work import num_tensors
from everest_ds.costs.step_time import predict_step

_NO_LINK = Link(0.0, 1e12)  # a lone rank communicates with no other rank


class CollectiveSample(NamedTuple):
    """A measured collective over `ranks` neighbours on one node."""

    name: str
    ranks: int
    num_bytes: int
    seconds: float


class TrainedStep(NamedTuple):
    """A measured step of the real trainer that never waited for data."""

    config: Experiment
    num_ranks: int
    seconds: float


@dataclass(frozen=True)
class Measurements:
    """Measurements that the ranks of one node took at the same time, each the mean over the ranks.

    Attributes:
        products: by precision, (rows, inputs, outputs) and FLOP/s.
        attention: by precision, tokens and FLOP/s.
        moving: by precision, bytes of a tensor and bytes per second.
        clips: (pixels, seconds) of decoding one clip.
        steps: steps of a tiny model, one for each ZeRO stage.
    """

    device: str
    memory_bytes: int
    asynchronous: bool
    num_ranks: int
    threads: int
    products: Mapping[str, Sequence[tuple[Sequence[float], float]]]
    attention: Mapping[str, Sequence[tuple[float, float]]]
    moving: Mapping[str, Sequence[tuple[float, float]]]
    copy_bytes_per_s: float
    fresh_bytes_per_s: float
    adam_values_per_s: float
    launch_s: float
    host_bytes_per_s: float
    host_adam_values_per_s: float
    collectives: Sequence[CollectiveSample]
    clips: Sequence[tuple[float, float]]
    steps: Sequence[TrainedStep]
    spare_cores: float
    baseline_bytes: int


def fit_machine(found: Measurements, peak_flops_per_s: Mapping[str, float], source: str) -> Machine:
    """Return the machine whose predictions come closest to the measurements.

    Args:
        found: the measurements of one node.
        peak_flops_per_s: peak of the device by precision, as far as a data sheet states it.
        source: human-readable origin of the numbers.
    """
    decode_s, decode_pixels_per_s = _decoding_rate(found.clips)
    machine = Machine(
        device=found.device,
        memory_bytes=found.memory_bytes,
        asynchronous=found.asynchronous,
        peak_flops_per_s=peak_flops_per_s,
        products={
            name: fit_curve((intensity(*s), r) for s, r in rows) for name, rows in found.products.items()
        },
        attention={name: fit_curve(rows) for name, rows in found.attention.items()},
        moving={name: fit_curve(rows) for name, rows in found.moving.items()},
        copy_bytes_per_s=found.copy_bytes_per_s,
        fresh_bytes_per_s=found.fresh_bytes_per_s,
        adam_values_per_s=found.adam_values_per_s,
        launch_s=found.launch_s,
        step_s=0.0,
        parameter_s={},
        host_link=Link(0.0, found.host_bytes_per_s),
        host_adam_values_per_s=found.host_adam_values_per_s,
        ranks_per_node=found.num_ranks,
        inside=fit_links(found.collectives) if found.collectives else same_link(_NO_LINK),
        between=_NO_LINK,
        decode_s=decode_s,
        decode_pixels_per_s=decode_pixels_per_s,
        spare_cores=found.spare_cores,
        threads=found.threads,
        baseline_bytes=found.baseline_bytes,
        source=source,
    )
    return replace(machine, parameter_s=_engine_seconds(found.steps, machine))


def fit_curve(points: Iterable[tuple[float, float]]) -> RateCurve:
    """Fit a curve with one point per octave of sizes: the geometric means of its measurements."""
    octaves = defaultdict(list)
    for size, rate in points:
        octaves[round(log2(size))].append((log(size), log(rate)))
    middles = [[fmean(column) for column in zip(*octave, strict=True)] for octave in octaves.values()]
    sizes, rates = zip(*sorted((exp(size), exp(rate)) for size, rate in middles), strict=True)
    return RateCurve(sizes, rates)


def fit_links(samples: Sequence[CollectiveSample]) -> dict[str, Link]:
    """Fit latency and rate of each collective: least squares of the relative error, neither below zero."""
    return {name: _fit_link([row for row in samples if row.name == name]) for name in COLLECTIVES}


def _fit_link(samples: Sequence[CollectiveSample]) -> Link:
    """Fit a link to ring collectives, linear in latency and seconds per byte: t = messages · α + sent / β."""
    rows = []
    for row in samples:
        passes = 2 if row.name == "all_reduce" else 1
        messages = passes * (row.ranks - 1)
        rows.append((messages / row.seconds, messages / row.ranks * row.num_bytes / row.seconds))
    latency_s, byte_s = _relative_least_squares(rows)
    return Link(latency_s, 1 / byte_s)


def _relative_least_squares(rows: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the positive x, y that bring a·x + b·y closest to 1 in all rows (a, b)."""
    aa, ab, bb = (sum(r[i] * r[j] for r in rows) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = sum(row[0] for row in rows), sum(row[1] for row in rows)
    determinant = aa * bb - ab * ab
    x, y = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
    if x > 0 and y > 0:
        return x, y
    return (0.0, b / bb) if x <= 0 else (a / aa, 1e-15)


def _decoding_rate(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return seconds of an empty clip and pixels per second, from the smallest and the largest clip."""
    (few, fast), (many, slow) = min(points), max(points)
    pixels_per_s = (many - few) / max(slow - fast, 1e-9)
    return max(0.0, fast - few / pixels_per_s), pixels_per_s


def _engine_seconds(steps: Iterable[TrainedStep], machine: Machine) -> dict[int, float]:
    """Return measured minus predicted step time per parameter tensor, by ZeRO stage."""
    seconds: dict[int, float] = {}
    for step in steps:
        predicted = predict_step(step.config, step.num_ranks, machine)
        beyond = step.seconds - predicted.step_s + predicted.term("data").seconds
        seconds[step.config.parallelism.zero_stage] = max(0.0, beyond / num_tensors(step.config))
    return seconds
