"""Tests of the check of the probes' ranking: Kendall's tau, and six runs that differ as they are meant to."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest


def test_tau_counts_the_pairs_that_agree() -> None:
    tau = import_module("check_probe").kendall_tau
    assert tau([1, 2, 3, 4], [10, 20, 30, 40]) == 1 and tau([1, 2, 3], [3, 2, 1]) == -1
    assert tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    # Worked example of tau-b: 4 pairs agree, none disagrees, and each side has another tie.
    assert tau([1, 1, 2, 3], [1, 2, 3, 3]) == pytest.approx(4 / 5)
    assert tau([1, 1], [1, 2]) == 0


def test_six_pre_trainings_are_fine_tuned_alike(tmp_path: Path) -> None:
    check = import_module("check_probe")
    study = check.RankingStudy(check.SCALES["smoke"], tmp_path, 1)
    chains = list(study.chains())
    assert len(chains) == 6 and len({chain[0].config.run.dir for chain in chains}) == 6
    for pretrained, *tuned in chains:
        assert {run.config.model.init_from for run in tuned} == {pretrained.config.run.dir}
        assert {run.num_steps for run in tuned} == {check.SCALES["smoke"].finetune_steps}
        assert len({run.config.run.seed for run in tuned}) == len(tuned) == check.TUNINGS
