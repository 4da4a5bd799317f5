"""Candidates with invented predictions, for tests of the code that ranks them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from everest_ds.config import Experiment
from everest_ds.config.zero_settings import zero_settings
from everest_ds.costs.memory import MemoryPrediction, predict_memory
from everest_ds.costs.step_time import StepPrediction
from everest_ds.costs.term import Term
from everest_ds.tuning.candidate import Candidate


def invented_candidate(
    config: Experiment, compute_s: float, num_bytes: int = 2**30, data_s: float = 0.0, clips: int = 64
) -> Candidate:
    """Return a candidate whose step takes `compute_s`, and then waits `data_s` for data."""
    terms = (
        Term("all", "compute", compute_s, compute_s, "", {}),
        Term("data", "data", data_s, data_s, "", {}),
    )
    step = StepPrediction(terms, clips, useful_flops=0.0, peak_flops_per_s=None)
    return Candidate(config, config, zero_settings(config), _memory(config), num_bytes, step)


@cache
def _memory(config: Experiment) -> MemoryPrediction:
    return replace(predict_memory(config, 1), peak_at="an invented moment")
