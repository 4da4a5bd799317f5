"""Reasons why a candidate is slower than the best: the part of its step that adds the most time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from everest_ds.costs.term import TermGroup
from everest_ds.tuning.search import Candidate
from everest_ds.tuning.space import Dropped, by_reason

_BOUND: dict[TermGroup, str] = {
    "compute": "its matrix products are smaller and reach a lower rate",
    "recompute": "recomputes activations",
    "optimizer": "updates more weights on each rank",
    "communication": "communication-bound",
    "offload": "bound by copies to and from the host",
    "data": "each rank decodes more clips",
    "overhead": "bound by operator launches and DeepSpeed's hooks",
}
_NOTHING_TO_SPEAK_OF = 1.005


def why_slower(candidate: Candidate, best: Candidate) -> str:
    """Return one line: how much slower the candidate is than the best, and the main cause."""
    own, theirs = candidate.step.split(), best.step.split()
    group = max(own, key=lambda name: own[name] - theirs[name])
    times = candidate.step.step_s / best.step.step_s
    much = f"{times:.2f} x the best step" if times >= _NOTHING_TO_SPEAK_OF else "about as fast as the best"
    return f"{much}: {_bound(group, candidate, best)}"


def slower_families(ranked: Sequence[Candidate], shown: int) -> Iterator[Dropped]:
    """Return shardings without a candidate among the first `shown`, and why the best of each is slower."""
    seen = {candidate.sharding for candidate in ranked[:shown]}
    first = {one.sharding: one for one in reversed(ranked[shown:]) if one.sharding not in seen}
    ordered = sorted(first.values(), key=lambda candidate: candidate.order)
    return by_reason((one.sharding, why_slower(one, ranked[0]), None) for one in ordered)


def _bound(group: TermGroup, candidate: Candidate, best: Candidate) -> str:
    if group == "compute" and candidate.sharding.precision != best.sharding.precision:
        return f"products in {candidate.sharding.precision} are slower"
    return _BOUND[group]
