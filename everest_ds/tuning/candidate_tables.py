"""The tables of `everest-ds tune` as rows: candidates, memory of one candidate, and families left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from everest_ds.config import plan_ranks
from everest_ds.costs.hardware.machine import Machine
from everest_ds.data.order import steps_per_epoch
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.cluster import Cluster
from everest_ds.tuning.knobs import columns_of
from everest_ds.tuning.space import Dropped
from everest_ds.tuning.trials.ranking import CLOSE_PCT
from everest_ds.units import GIB, format_bytes, format_duration

TableRow = dict[str, Any]
_HOUR_S, _JOULES_PER_KWH = 3600, 3.6e6
_OTHER_GROUPS = ("optimizer", "overhead")
_SHORT_HEADINGS = {"communication": "comm.", "recompute": "again"}  # for narrow columns of numbers
_MAY_BE_UNUSED = ("again", "comm.", "offload", "data")


@dataclass(frozen=True)
class Costs:
    """The inputs for total training time and cost.

    Attributes:
        num_samples: videos per epoch; None if not known.
        gpu_hour, kwh: prices, in any currency; None if not given.
    """

    num_samples: int | None = None
    gpu_hour: float | None = None
    kwh: float | None = None


def candidate_rows(ranked: Sequence[Candidate], cluster: Cluster, costs: Costs) -> list[TableRow]:
    """Return one row per candidate, in the given order."""
    rows = [
        {"rank": rank, **_settings(one, cluster)}
        | {"step_ms": round(1e3 * one.step.step_s, 1), "clips/s": round(one.step.clips_per_s, 1)}
        | {"MFU_%": None if one.step.mfu_pct is None else round(one.step.mfu_pct, 1)}
        | total_of(one, cluster, costs)
        | {"GiB": round(one.needed_bytes / GIB, 1), "free_%": round(cluster.free_pct(one.needed_bytes))}
        | _split(one)
        for rank, one in enumerate(ranked, start=1)
    ]
    unused = [name for name in _MAY_BE_UNUSED if not any(row[name] for row in rows)]
    return [{name: value for name, value in row.items() if name not in unused} for row in rows]


def total_of(candidate: Candidate, cluster: Cluster, costs: Costs) -> TableRow:
    """Return the time, cost and energy of a whole training, as far as they are known."""
    if costs.num_samples is None:
        return {}
    steps = steps_per_epoch(costs.num_samples, plan_ranks(candidate.config, cluster.num_ranks))
    epoch_s = steps * candidate.step.step_s
    total_s = epoch_s * candidate.config.schedule.epochs
    row: TableRow = {"epoch": format_duration(epoch_s), "in_all": format_duration(total_s)}
    if costs.gpu_hour is not None:
        row["GPUs_cost"] = round(costs.gpu_hour * cluster.num_ranks * total_s / _HOUR_S, 2)
    if cluster.machine.watts is not None and costs.kwh is not None:
        kwh = cluster.machine.watts * cluster.num_ranks * total_s / _JOULES_PER_KWH
        row |= {"kWh": round(kwh, 1), "energy_cost": round(costs.kwh * kwh, 2)}
    return row


def memory_rows(candidate: Candidate, machine: Machine) -> list[TableRow]:
    """Return the peak memory per rank of a candidate by category, with the usable memory."""
    parts = candidate.memory.parts()
    beside = {"host_memory": candidate.memory.host_bytes} if candidate.memory.host_bytes else {}
    return [
        {"memory": name.replace("_", " "), "per_rank": format_bytes(size)}
        for name, size in {
            **parts,
            "total": candidate.needed_bytes,
            "usable": machine.memory_bytes,
            **beside,
        }.items()
    ]


def close_calls(ranked: Sequence[Candidate], cluster: Cluster) -> list[str]:
    """Describe each candidate that leaves little memory free."""
    free = [cluster.free_pct(candidate.needed_bytes) for candidate in ranked]
    return [
        f"candidate {rank} leaves {pct:.1f} % free"
        for rank, pct in enumerate(free, start=1)
        if pct < CLOSE_PCT
    ]


def dropped_rows(dropped: Sequence[Dropped]) -> list[TableRow]:
    """Return the families left out, each with its reason, as rows."""
    return [{"family": one.family, "why_not": one.reason} for one in dropped]


def as_json(rows: Sequence[TableRow], ranked: Sequence[Candidate]) -> list[Mapping[str, Any]]:
    """Return the rows with the figures that programs need: settings, bytes by category, seconds by group."""
    return [
        row
        | {
            "overrides": list(one.overrides),
            "reduce_bucket_size": one.zero.reduce_bucket_values if one.own_buckets else None,
            "memory_bytes": one.memory.parts() | {"needed": one.needed_bytes},
            "step_s": one.step.step_s,
            "split_s": one.step.split(),
        }
        for row, one in zip(rows, ranked, strict=True)
    ]


def _settings(candidate: Candidate, cluster: Cluster) -> TableRow:
    accumulated = plan_ranks(candidate.config, cluster.num_ranks).grad_accum_steps
    buckets = f", buckets {candidate.zero.reduce_bucket_values / 1e6:g} M" if candidate.own_buckets else ""
    row = columns_of(candidate.config)
    return {
        **row,
        "sharding": f"{row['sharding']}{buckets}",
        "micro_x_accum": f"{row['micro_x_accum']} x {accumulated}",
    }


def _split(candidate: Candidate) -> TableRow:
    """Return the parts of a step in ms: compute, recompute, exposed communication and so on."""
    split = candidate.step.split()
    seconds: dict[str, float] = {_SHORT_HEADINGS.get(group, group): split[group] for group in split}
    seconds["other"] = sum(seconds.pop(group) for group in _OTHER_GROUPS)
    return {name: round(1e3 * value, 1) for name, value in seconds.items()}
