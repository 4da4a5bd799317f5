"""Tests of the numbers of GPUs from which a choice pays, with invented candidates."""

from __future__ import annotations

from everest_ds.config import load_experiment
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.scaling import payoffs, summarise_number, values_of
from tests.tuning.invented import invented_candidate


def made(stage: int, mode: str, compute_s: float, data_s: float = 0.0) -> Candidate:
    overrides = [f"parallelism.zero_stage={stage}", f"recompute.mode={mode}"]
    config = load_experiment("k400_pretrain_vit_base", overrides)
    return invented_candidate(config, compute_s, data_s=data_s, clips=100)


def test_a_choice_pays_where_its_best_candidate_is_the_best_of_all_without_waiting_for_data() -> None:
    found = {
        1: [made(3, "full", 10.0)],
        4: [made(2, "none", 2.0, data_s=8.0), made(3, "none", 2.5), made(3, "full", 3.0)],
        8: [made(2, "none", 1.0), made(1, "none", 0.999), made(1, "mlp", 2.0)],
    }
    rows = [summarise_number(gpus, candidates) for gpus, candidates in found.items()]
    assert [row.gpus for row in rows] == [1, 4, 8]
    assert rows[1].clips_per_s == 50 and rows[1].data_wait_pct == 80
    assert rows[1].best == {"ZeRO stage": "2", "tensor degree": "1", "recompute": "none"}
    assert rows[1].by_choice["recompute"] == {"none": 50, "full": 100 / 3}
    assert values_of(rows, "recompute") == ["none", "mlp", "full"]
    pays = {(one.trait, one.value): (one.fits_on, one.pays_on) for one in payoffs(rows)}
    assert pays["ZeRO stage", "3"] == ((1, 4), (1,))
    assert pays["ZeRO stage", "2"] == ((4, 8), (4, 8))  # on 8 GPUs, within half a percent of stage 1
    assert pays["ZeRO stage", "1"] == ((8,), (8,))
    assert pays["recompute", "mlp"] == ((8,), ())
