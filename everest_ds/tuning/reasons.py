"""Why a candidate is not the best: the part of its step that costs it most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from everest_ds.tuning.search import Candidate
from everest_ds.tuning.space import Dropped, by_reason
from everest_ds.tuning.term import Group

_BOUND: dict[Group, str] = {
    "compute": "its products are smaller and attain less",
    "recompute": "recomputes",
    "optimizer": "updates more weights on each rank",
    "communication": "communication-bound",
    "offload": "bound by copies to and from the host",
    "data": "its ranks decode more clips",
    "overhead": "bound by launches and DeepSpeed's hooks",
}
_NOTHING_TO_SPEAK_OF = 1.005


def why_slower(candidate: Candidate, best: Candidate) -> str:
    """What most of the difference to the best is, in a line."""
    own, theirs = candidate.step.split(), best.step.split()
    group = max(own, key=lambda name: own[name] - theirs[name])
    times = candidate.step.step_s / best.step.step_s
    much = (
        f"{times:.2f} x the best step" if times >= _NOTHING_TO_SPEAK_OF else "as fast, as far as can be said"
    )
    return f"{much}: {_bound(group, candidate, best)}"


def slower_families(ranked: Sequence[Candidate], shown: int) -> Iterator[Dropped]:
    """Shardings that have candidates, but none among the first so many: the best of each."""
    seen = {candidate.sharding for candidate in ranked[:shown]}
    first = {one.sharding: one for one in reversed(ranked[shown:]) if one.sharding not in seen}
    ordered = sorted(first.values(), key=lambda candidate: candidate.order)
    return by_reason((one.sharding, why_slower(one, ranked[0]), None) for one in ordered)


def _bound(group: Group, candidate: Candidate, best: Candidate) -> str:
    if group == "compute" and candidate.sharding.precision != best.sharding.precision:
        return f"{candidate.sharding.precision} computes slower"
    return _BOUND[group]
