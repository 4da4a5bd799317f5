"""Tests of the study of token selections: fair comparisons, correct statistics, and resuming."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from everest_ds.config.tokens import ClipGeometry
from everest_ds.data import reading
from everest_ds.data.synthetic import synthesize
from everest_ds.errors import RunFolderError
from everest_ds.models.selection import packer
from everest_ds.models.selection.codec import codec_importance

TOOLS = Path(__file__).parents[2] / "tools"


def runs(scale: str, out: Path) -> list[Any]:
    protocol = import_module("study.protocol")
    return [run for chain in protocol.Study(protocol.SCALES[scale], out).chains() for run in chain]


@pytest.mark.parametrize("scale", ["small", "large"])
def test_arms_have_equal_compute_or_equal_steps_and_see_equally_many_tokens(
    scale: str, tmp_path: Path
) -> None:
    arms = import_module("study.arms")
    every = [run for run in runs(scale, tmp_path) if run.seed == 1 and run.budgets]
    for task, compared, reference in (
        ("finetune", arms.TUNED, "random"),
        ("pretrain", arms.PRETRAINED, "rero"),
    ):
        for kind in arms.KINDS:
            there = [run for run in every if run.kind == kind and run.config.task == task]
            names = {name for name, arm in compared.items() if kind in arm.kinds}
            base = next((run for run in there if run.arm == reference), None)
            for budget, unmatched in (("steps", {"dense"}), ("compute", set())):
                group = [run for run in there if budget in run.budgets]
                assert sorted(run.arm for run in group) == sorted(names - unmatched)  # one run per arm
                for run in group:
                    assert base is not None
                    if budget == "steps":
                        assert run.num_steps == base.num_steps
                    else:  # within half a step
                        assert run.training_macs == pytest.approx(base.training_macs, rel=0.015)
            visible = {run.config.token_counts.num_visible for run in there if run.arm != "dense"}
            assert len(visible) <= 1


def test_what_is_compared_differs_in_nothing_else(tmp_path: Path) -> None:
    chain = [run for run in runs("small", tmp_path) if run.kind == "pauses" and run.seed == 2]
    steps = [run for run in chain if run.config.task == "finetune" and "steps" in run.budgets]
    assert len(steps) == 12
    trees = [run.config.model_dump(mode="json", exclude={"tokens": True, "run": {"dir"}}) for run in steps]
    assert all(tree == trees[0] for tree in trees)


def test_a_list_of_visits_takes_every_video_equally_often_and_mixes_labels(tmp_path: Path) -> None:
    running = import_module("study.running")
    manifest = import_module("everest_ds.data.video_list")
    run = runs("smoke", tmp_path)[0]
    folder = run.config.data.train.parent
    folder.mkdir(parents=True)
    videos = [manifest.Sample(folder / f"{i}.mp4", i % 6) for i in range(5)]
    manifest.write_manifest(folder / "train.txt", videos, folder)
    running._list_visits(run, folder, seed=0)
    listed = manifest.read_manifest(run.config.data.train, root=None, num_classes=6, labelled=True)
    assert len(listed) == run.num_clips == 16
    assert sorted(Counter(sample.name for sample in listed).values()) == [3, 3, 3, 3, 4]


def test_the_probe_is_at_the_minimum_of_its_convex_loss() -> None:
    probe = import_module("everest_ds.probing.linear_probe")
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(120) % 3
    x = torch.randn(120, 8, generator=generator) + 2 * torch.eye(8)[label]
    linear = probe.fit_logistic(x, label, 3, 1e-3)
    # At the optimum, the classes' mean residuals balance the penalty: X^T (p - y) / n + 2 c W = 0.
    residual = linear(x).softmax(dim=1) - torch.eye(3)[label]
    gradient = x.T @ residual / len(x) + 2 * 1e-3 * linear.weight_DC
    assert gradient.abs().max() < 1e-4
    assert (linear(x).argmax(dim=1) == label).float().mean() > 0.9


@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.slow), "panning"])
def test_rero_keeps_what_changes_and_the_oracle_what_moves(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    protocol, kept = import_module("study.protocol"), import_module("study.kept")
    monkeypatch.setattr(reading, "open_sample", reading.open_sample)  # restores it after the test
    study = protocol.Study(protocol.SCALES["smoke"], tmp_path)
    synthesize(study.data(kind), {"test": 12}, study.spec(kind), workers=1)
    shares = kept.object_shares(study, kind)
    assert shares["dense"] == pytest.approx(100) and 15 < shares["random"] < 35 and shares["oracle"] > 90
    if kind == "plain":
        assert min(shares[name] for name in ("rero", "sketch", "pixel", "codec", "camera")) > 80
    else:
        assert max(shares[name] for name in ("rero", "sketch", "pixel")) < shares["random"]
        assert shares["camera"] > 2 * shares["pixel"]
    assert packer.codec_importance is codec_importance


def test_a_clip_is_rebuilt_from_the_kept_tubelets_of_each_place() -> None:
    rebuild = import_module("study.rebuild")
    geometry = ClipGeometry(12, 2, 8, 4)  # 6 slots of 4 places
    clip = torch.randint(
        0, 256, (3, 12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    keep = (
        torch.rand(3, 24, generator=torch.Generator().manual_seed(1))
        .topk(7, dim=1)
        .indices.sort(dim=1)
        .values
    )
    expected = torch.full_like(clip, 128)
    for number, tokens in enumerate(keep.tolist()):
        for slot in range(6):
            for place in range(4):
                own = [token // 4 for token in tokens if token % 4 == place]
                if own:
                    source = max((each for each in own if each <= slot), default=own[0])
                    row, column = 4 * (place // 2), 4 * (place % 2)
                    part = clip[number, 2 * source : 2 * source + 2, row : row + 4, column : column + 4]
                    expected[number, 2 * slot : 2 * slot + 2, row : row + 4, column : column + 4] = part
    assert torch.equal(rebuild.rebuilt(clip, keep, geometry), expected)
    moving = (clip.float().diff(dim=1).abs().mean(dim=-1) > 10).numpy()
    wrong = (expected.float() - clip.float()).square().mean(dim=-1)[:, 1:].numpy()
    errors = [math.sqrt(each[where].mean()) for each, where in zip(wrong, moving, strict=True)]
    assert rebuild.moving_error(clip, keep, geometry).tolist() == pytest.approx(errors, rel=1e-4)


def row(arm: str, seed: int, top1: float, *budgets: str, **more: Any) -> dict[str, Any]:
    place = {"kind": "plain", "task": "finetune", "training_macs": 1e9, "cpu_s": 60.0}
    budget = list(budgets) or ["steps", "compute"]
    return {"arm": arm, "seed": seed, "top1": top1, "budgets": budget, **place, **more}


def test_the_report_begins_with_where_rero_loses_and_pairs_seeds() -> None:
    report = import_module("study.report")
    rows = [row("rero", seed, top1, "steps") for seed, top1 in ((0, 78.0), (1, 87.0), (2, 80.0))]
    # Seed 2 of the oracle has not run yet: the others differ by 2 and 4 points.
    rows += [row("oracle", 0, 80.0), row("oracle", 1, 91.0), row("random", 0, 70.0)]
    text = report.render(rows, 9, {"plain": {"rero": 97.25}})
    assert text.startswith(
        "**ReRo clearly loses nowhere**, among the runs that have ended. Behind, with an interval that"
        " includes 0: to oracle, true motion on plain in fine-tuning at equal steps (-3.0 ± 12.7).\n"
    )
    clear = [row("tube", 0, 90.0, "steps"), row("tube", 1, 99.0, "steps")]
    assert report.verdict([*rows[:2], *clear]) == (
        "**ReRo loses** to tube on plain in fine-tuning at equal steps (-12.0 ± 0.0)."
    )
    # 95 % interval of the mean of three: 4.303 · 4.73 / √3
    assert "| plain | ReRo, embedding | 1 | 81.7 ± 11.7 |  | - | - |  | 97 % |" in text
    assert "| plain | random | 1 | 70.0 (1 seed) | +8.0 (1 seed) | 1 | 70.0 (1 seed) | - | - |" in text
    assert "6 of 9 runs, 6m 00s" in text
    assert report.draw(rows).startswith(b"\x89PNG")
    assert report.verdict(rows[:3]).startswith("**ReRo clearly loses nowhere**")


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (4, 2.776), (10, 2.228), (23, 2.069)])
def test_quantiles_are_those_of_students_t(freedom: int, quantile: float) -> None:
    assert import_module("study.report").t_quantile(freedom) == pytest.approx(quantile, rel=2e-3)


def test_a_folder_of_another_study_is_refused_by_name(tmp_path: Path) -> None:
    protocol, running = import_module("study.protocol"), import_module("study.running")
    study = protocol.Study(protocol.SCALES["smoke"], tmp_path / "study")
    running.claim(study)
    running.claim(
        replace(study, scale=replace(study.scale, seeds=(0, 7)))
    )  # further seeds of the same study are accepted
    for other in (replace(study, data_seed=5), replace(study, scale=protocol.SCALES["small"])):
        with pytest.raises(RunFolderError, match="another scale or data seed"):
            running.claim(other)


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute on two idle cores
def test_the_smallest_study_runs_and_runs_again_what_is_missing_to_the_same_figures(tmp_path: Path) -> None:
    first = smallest_study(tmp_path, jobs=2)
    assert len(first) == len(runs("smoke", tmp_path))
    assert all(0 <= line["top1"] <= 100 for line in first if line["task"] == "finetune")
    (tmp_path / "runs" / "panning-0" / "rero" / "oracle-3" / "study.json").unlink()
    again = smallest_study(tmp_path, jobs=1)
    changed = [(old, new) for old, new in zip(first, again, strict=True) if old != new]
    assert [(old["kind"], old["name"]) for old, _ in changed] == [("panning", "oracle-3")]
    old, new = changed[0]
    assert old | {"cpu_s": None} == new | {"cpu_s": None}


def smallest_study(out: Path, jobs: int) -> list[dict[str, Any]]:
    """Run the smallest study and return its rows."""
    command = [sys.executable, str(TOOLS / "study_selection.py"), str(out), "--scale", "smoke"]
    file = out / "rows.json"
    subprocess.run([*command, "--jobs", str(jobs), "--json", str(file)], check=True, capture_output=True)
    rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    return rows
