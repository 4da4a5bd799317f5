"""Tests of the tuner's trials in the real trainer: measurements, names of failures, and no repeated runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from everest_ds.config import dump_experiment, load_experiment
from everest_ds.errors import ExitCode
from everest_ds.training.input_files import manifest_of
from everest_ds.tuning.candidate import Candidate
from everest_ds.tuning.trials.one_trial import Setup, classify_exit, run_here, trial_overrides
from everest_ds.tuning.trials.record import WARM_UP_STEPS
from everest_ds.tuning.trials.run import run_name, try_here, with_trials
from tests.training.runs import experiment
from tests.tuning.invented import invented_candidate

PLACE = {"device": "test"}


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    """Trials of a tiny recipe that has no videos."""
    config = experiment(tmp_path / "nowhere", tmp_path / "run", data={"num_workers": 0})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(dump_experiment(config))
    return Setup("pretrain", str(recipe), ("data.train=null",), 1, tmp_path / "tuned", WARM_UP_STEPS + 2, 120)


def candidate(setup: Setup, *overrides: str) -> Candidate:
    base = load_experiment(setup.source, setup.overrides)
    config = load_experiment(setup.source, [*setup.overrides, *overrides])
    found = replace(invented_candidate(base, 1.0, 10**9, clips=8), config=config)
    assert load_experiment(setup.source, [*setup.overrides, *found.overrides]) == config
    return found


def outcomes(candidates: Sequence[Candidate]) -> list[str]:
    return [one.trial.outcome for one in candidates if one.trial]


def test_trials_are_measured_or_say_why_not_and_run_once(
    setup: Setup, capsys: pytest.CaptureFixture[str]
) -> None:
    good = candidate(setup, "parallelism.zero_stage=2")
    bad = candidate(setup, "parallelism.zero_stage=3", "parallelism.offload_to_nvme=/nowhere/at/all")
    done = try_here(setup, [good, bad], PLACE)
    assert outcomes(done) == ["measured", "crash"]
    trial, crash = (one.trial for one in done)
    assert trial and trial.step_s and 0.001 < trial.step_s < 60
    assert trial.peak_bytes and 10**8 < trial.peak_bytes < 10**10
    assert crash and "/nowhere" in crash.reason
    said = capsys.readouterr().out
    assert "data.train is not set: trials read synthetic clips" in said

    run = setup.runs / run_name(setup, good, PLACE)
    videos = load_experiment(run).data.train
    assert videos is not None and videos.is_file() and not (run / "checkpoints").exists()
    before = (run / "metrics.jsonl").stat().st_mtime_ns
    assert try_here(setup, [good, bad], PLACE) == done
    assert (run / "metrics.jsonl").stat().st_mtime_ns == before
    elsewhere = with_trials(setup, [good], {"device": "another"})
    assert elsewhere[0].trial is None


def test_a_trial_that_takes_too_long_is_a_timeout(setup: Setup) -> None:
    hurried = replace(setup, timeout_s=0.5)
    [late] = try_here(hurried, [candidate(setup)], PLACE)
    assert late.trial and late.trial.outcome == "timeout"
    assert late.trial.reason == "not finished after 0.5 s"


def test_the_users_own_videos_are_taken_as_often_as_a_trial_needs(setup: Setup, motion_data: Path) -> None:
    own = replace(setup, overrides=(f"data.train={motion_data / 'train.txt'}",))
    words = trial_overrides(own, candidate(own).config)
    text = [word for word in words if word.startswith("data.train=")][-1]
    lines = Path(yaml.safe_load(text.partition("=")[2])).read_text().splitlines()
    assert len(lines) == own.steps * 8
    assert lines[0].startswith(str(motion_data / "train"))
    assert "data.stage=null" not in words


def test_synthetic_clips_are_not_staged(setup: Setup) -> None:
    staged = replace(setup, overrides=("data.stage=/local",))
    words = trial_overrides(staged, candidate(staged).config)
    assert words.index("data.stage=null") > words.index("data.stage=/local")


def test_trials_of_a_run_on_a_staged_cache_decode_the_same_tokens(setup: Setup, motion_data: Path) -> None:
    cache = ("tokens.score=pixel", "data.draws=2", "data.token_cache=/cache", "data.stage=/local")
    own = replace(setup, overrides=(f"data.train={motion_data / 'train.txt'}", *cache))
    tried = load_experiment(own.source, list(trial_overrides(own, candidate(own).config)))
    assert tried.data.token_cache is None and tried.data.draws == 2 and tried.data.sends_tokens
    assert manifest_of(tried, "train") == tried.data.train


@pytest.mark.parametrize(
    ("code", "output", "outcome"),
    [
        (ExitCode.OUT_OF_MEMORY, "error: rank 0: out of memory on cuda:0; given: CUDA out of memory", "oom"),
        (1, "RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "oom"),
        (6, "error: rank 1 was ended by SIGKILL; fix: look for the out-of-memory killer in dmesg", "oom"),
        (6, "error: rank 0 lost a peer: no answer from rank 1", "crash"),
        (2, "some log\nerror: config.yaml: unknown config key `x`\n", "crash"),
    ],
)
def test_how_a_run_ends_is_told_apart(code: int, output: str, outcome: str) -> None:
    end = classify_exit(code, output)
    assert end.outcome == outcome
    assert end.reason and end.reason in output


@pytest.mark.slow
def test_running_out_of_memory_for_real_is_an_outcome(setup: Setup, tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, before[1]))
    try:
        large = ("model.backbone=vit_huge", "model.patch_size=4", "tokens.mask_ratio=0.6")
        config = candidate(setup, *large).config
        end = run_here(setup, (*trial_overrides(setup, config), *large), tmp_path / "trial")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert end.outcome == "oom", end
