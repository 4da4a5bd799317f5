"""Tests of the study of forms of data: arms differ in it alone; the table has the runs that have ended."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any


def test_arms_differ_in_their_draws_alone_and_recur(tmp_path: Path) -> None:
    draws = import_module("study.draws")
    study = draws.DrawsStudy(draws.SCALES["small"], tmp_path)
    runs = [run for chain in study.chains() for run in chain if run.seed == 2]
    for arms in (
        [run for run in runs if run.name == "pretrain"],
        [run for run in runs if run.name.startswith("tuned")],
    ):
        assert [run.config.data.draws for run in arms] == [None, None, 16, 4, 1]
        exclude: Any = {"data": {"draws", "train"}, "run": {"dir"}}
        trees = [run.config.model_dump(mode="json", exclude=exclude) for run in arms]
        assert all(tree == trees[0] for tree in trees)
        assert [run.config.data.train.name for run in arms if run.config.data.train] == [
            "visits-320.txt",
            "visits-320.store",
            *3 * ["visits-320.txt"],
        ]
        assert all(run.config.schedule.epochs > 2 * 16 for run in arms)
        assert all(run.num_clips % run.config.schedule.epochs == 0 for run in arms)


def test_the_table_pairs_seeds_with_the_arm_of_fresh_draws() -> None:
    draws = import_module("study.draws")
    scale = draws.SCALES["small"]
    common = {"kind": "plain", "name": "short"}
    rows = [
        {**common, "seed": seed, "arm": arm, "top1": top1, "probe_top1": top1}
        for seed, arm, top1 in ((1, "fresh", 60.0), (2, "fresh", 50.0), (2, "4-draws", 48.5))
    ]
    text = draws.render(rows, draws.DrawsStudy(scale, Path("study"), arms=("4 draws",)))
    assert (
        "| plain | 4 draws | 48.5 (1 seed) | -1.5 (1 seed) | 48.5 (1 seed) | -1.5 (1 seed) | - |  |" in text
    )
    assert "| 16 draws |" not in text
    assert "| plain | fresh | 55.0 ± 63.5 |  | 55.0 ± 63.5 |  | - |  |" in text and "3 of 18 runs" in text
