"""Tests of the pure parts of `tune --trials`: the store of trials, the corrections and the ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from everest_ds.config import load_experiment
from everest_ds.errors import RunFolderError
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.trials.baselines import natural_baselines
from everest_ds.tuning.trials.correction import Observed, fit_correction, kendall_tau
from everest_ds.tuning.trials.ranking import TrialResults, pareto_front, rank_candidates
from everest_ds.tuning.trials.record import (
    TRIALS_FILE,
    Trial,
    TrialOutcome,
    append_trial,
    read_trials,
    summarise_steps,
    trial_key,
)
from tests.tuning.invented import invented_candidate

RECIPE = "k400_pretrain_vit_base"
GB = 10**9


def tried(
    name: str,
    predicted_s: float,
    gigabytes: float,
    outcome: TrialOutcome | None = None,
    *measured: float,
    stage: str = "2",
) -> Candidate:
    """Return a candidate with a name as its note; `measured` holds the seconds and gigabytes of its trial."""
    trial = None
    if outcome:
        step_s, peak = (measured[0], int(GB * measured[1])) if measured else (None, None)
        trial = Trial(name, name, (), outcome, step_s, peak, 0.0, "" if measured else "said so")
    config = load_experiment(RECIPE, [f"parallelism.zero_stage={stage}"])
    return replace(invented_candidate(config, predicted_s, int(GB * gigabytes)), trial=trial, note=name)


def names(results: TrialResults) -> list[str]:
    return [one.candidate.note for one in results.ranked]


def test_trials_are_read_as_they_were_kept_without_the_line_that_was_cut_off(tmp_path: Path) -> None:
    first = Trial("k1", "a", ("x=1",), "measured", 0.5, 10**9, 3.0)
    again = replace(first, step_s=0.4)
    for trial in (first, Trial("k2", "b", (), "oom", reason="no memory"), again):
        append_trial(tmp_path, trial)
    with open(tmp_path / TRIALS_FILE, "a") as stream:
        stream.write('{"key": "k3", "na')
    assert read_trials(tmp_path) == {"k1": again, "k2": Trial("k2", "b", (), "oom", reason="no memory")}
    (tmp_path / TRIALS_FILE).write_text("not JSON\n")
    with pytest.raises(RunFolderError, match="damaged"):
        read_trials(tmp_path)


def test_a_trials_key_is_what_would_be_measured() -> None:
    def key(*overrides: str, ranks: int = 8, device: str = "a") -> str:
        return trial_key(load_experiment(RECIPE, overrides), ranks, {"device": device})

    same = {key(), key("run.dir=elsewhere"), key("schedule.epochs=99"), key("batch.grad_accum_steps=1")}
    assert len(same) == 1
    others = {key("batch.micro_batch_size=16"), key("model.patch_size=8"), key(ranks=4), key(device="b")}
    assert len(others | same) == 5


def test_of_a_runs_steps_those_after_warm_up_count() -> None:
    rates = [1.0, 1.0, 1.0, 8.0, 10.0, 16.0]
    rows = [{"clips_per_s": rate, "memory_bytes": 7, "data_wait_pct": 1.0} for rate in rates]
    assert summarise_steps([*rows, {"val_top1": 3.0}], clips=20)["step_s"] == 2.0
    with pytest.raises(RunFolderError):
        summarise_steps(rows[:3], clips=20)


def test_kendalls_tau_counts_pairs_in_order_and_those_that_are_not() -> None:
    values = [3.0, 1.0, 2.0, 5.0]
    assert kendall_tau(values, [value**3 for value in values]) == 1
    assert kendall_tau(values, [-value for value in values]) == -1
    # By hand: 4 of 6 pairs agree, none disagrees, and each list has one tie, so tau-b = 4 / sqrt(5 * 5).
    assert kendall_tau([1, 2, 2, 3], [1, 3, 2, 3]) == pytest.approx(0.8)
    assert kendall_tau([1, 1], [1, 2]) is None


def observed(ratio_of: dict[str, float], jitter: Sequence[float]) -> list[Observed]:
    traits = [(stage, mode) for stage in ("1", "2", "3") for mode in ("none", "full")]
    return [
        Observed(
            {"ZeRO stage": stage, "recompute": mode},
            2.0,
            2.0 * ratio_of.get(stage, ratio_of.get(mode, 1)) * j,
        )
        for j in jitter
        for stage, mode in traits
    ]


def test_the_correction_finds_the_trait_by_which_the_model_is_wrong() -> None:
    by_stage = fit_correction(observed({"3": 1.5}, (0.99, 1.01)))
    assert by_stage.trait == "ZeRO stage"
    assert by_stage.factor({"ZeRO stage": "3", "recompute": "full"}) == pytest.approx(1.5, rel=0.02)
    assert by_stage.factor({"ZeRO stage": "0", "recompute": "full"}) == by_stage.common
    assert fit_correction(observed({"none": 0.7}, (0.99, 1.01))).trait == "recompute"
    everywhere = fit_correction(observed({"1": 1.3, "2": 1.3, "3": 1.3}, (0.99, 1.01)))
    assert everywhere.trait is None and everywhere.common == pytest.approx(1.3, rel=0.02)
    assert fit_correction(observed({}, (1.0, 1.0))).common == 1.0
    one_trial = observed({"3": 9.0}, (1.0,))[:1]  # too few to correct the other candidates
    assert fit_correction(one_trial).common == 1.0


def test_what_ran_out_of_memory_is_never_recommended_nor_what_needs_as_much() -> None:
    candidates = [
        tried("fastest", 1.0, 60, "oom"),
        tried("larger", 1.1, 61),
        tried("good", 2.0, 40, "measured", 2.0, 75),
        tried("slower", 3.0, 20, "measured", 3.0, 37.5),
        tried("unseen", 1.5, 30),
        tried("beyond", 0.5, 45),
    ]
    result = rank_candidates(candidates, 80 * GB)
    assert names(result)[:3] == ["unseen", "good", "slower"]
    assert result.recommended and result.recommended.candidate.note == "good"
    assert "close" in result.recommended.remarks
    assert [one.candidate.note for one in pareto_front(result.ranked)] == ["slower", "unseen"]
    refused = {one.candidate.note: one.refused for one in result.ranked if one.refused}
    assert refused.keys() == {"fastest", "larger", "beyond"}
    assert refused["fastest"].startswith("oom") and "corrected by the trials" in refused["beyond"]
    assert rank_candidates(candidates[:2], 80 * GB).recommended is None


def test_a_corrected_model_changes_the_order_of_what_has_not_run() -> None:
    ran = [
        tried(f"{stage}{n}", n, 1, "measured", n * (2 if stage == "3" else 1), 1, stage=stage)
        for stage in "23"
        for n in (4, 5, 6)
    ]
    result = rank_candidates([*ran, tried("two", 3.5, 1), tried("three", 3.0, 1, stage="3")], 10 * GB)
    assert names(result)[0] == "two"
    assert result.time.trait == "ZeRO stage"
    assert result.tau is not None and result.tau > 0


def test_the_baselines_are_plain_data_parallelism_where_it_exists_and_zero_2() -> None:
    def load(precision: str) -> list[tuple[str, str, int]]:
        found = natural_baselines(
            lambda overrides: load_experiment(RECIPE, [f"precision={precision}", *overrides]), 8, 64
        )
        for baseline in found:
            assert baseline.config.batch.global_batch_size == 64
            assert baseline.config.batch.micro_batch_size == 8  # the recipe's 32 exceeds 64 clips / 8 ranks
        return [(one.name, one.note, one.config.parallelism.zero_stage) for one in found]

    assert load("fp32") == [("plain data parallelism", "", 0), ("ZeRO-2", "", 2)]
    [(_, note, stage), _] = load("bf16")
    assert stage == 1 and "DeepSpeed 0.19" in note
