"""Why a candidate is not the best: the part of its step that costs it most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from everest_ds.tuning.search import Candidate
from everest_ds.tuning.space import Dropped
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
    # Waiting for data hides what else would differ.
    groups: list[Group] = [group for group in own if group != "data"]
    group = max(groups, key=lambda name: own[name] - theirs[name])
    seconds, more = candidate.step.step_s, own[group] - theirs[group]
    said = f"{_BOUND[group]}: {1e3 * more:.1f} ms more of it"
    if seconds < _NOTHING_TO_SPEAK_OF * best.step.step_s:
        return f"as fast while data are waited for; else {said}"
    return f"{seconds / best.step.step_s:.2f} x the best step; {said}"


def slower_families(ranked: Sequence[Candidate], shown: int) -> Iterator[Dropped]:
    """Shardings that have candidates, but none among the first so many: the best of each."""
    seen = {candidate.sharding for candidate in ranked[:shown]}
    for candidate in ranked[shown:]:
        if candidate.sharding not in seen:
            seen.add(candidate.sharding)
            yield Dropped(str(candidate.sharding), why_slower(candidate, ranked[0]))
