"""Tests of every command in docs/tune.md: fast ones run unchanged, the others as far as this machine can."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.cli.test_cli import run_main
from tests.docs.commands import deepspeed_example

GUIDE = Path(__file__).parents[2] / "docs" / "tune.md"
BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Return the words of each distinct line in the guide's code blocks."""
    lines = [
        line for block in BLOCK.findall(GUIDE.read_text()) for line in block.splitlines() if line.strip()
    ]
    return [shlex.split(line) for line in dict.fromkeys(lines)]


def runs(words: list[str]) -> bool:
    return not {"--trials", "--calibrate"} & set(words) and words[0] == "everest-ds"


FAST = [words for words in commands() if runs(words)]
OTHERS = [words for words in commands() if not runs(words)]


@pytest.mark.slow
@pytest.mark.parametrize("words", FAST, ids=" ".join)
def test_a_command_of_the_guide_runs_as_it_stands(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ds_config.json").write_text(deepspeed_example())
    assert run_main(monkeypatch, *words[1:]) == 0
    assert (tmp_path / "tuned" / words[2] / "winner.yaml").is_file()


@pytest.mark.slow
def test_trials_of_the_guide_for_a_cluster_are_planned_up_to_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [words] = [words for words in OTHERS if "--sbatch" in words]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    assert run_main(monkeypatch, *words[1:]) == 2
    assert "SLURM is not installed here" in capsys.readouterr().err


def test_other_commands_of_the_guide_are_those_that_other_tests_run() -> None:
    """The commands left out are these: other tests run them, except the benchmark, which takes minutes."""
    assert [words[:4] for words in OTHERS if "--sbatch" not in words] == [
        ["everest-ds", "tune", "--calibrate"],
        ["everest-ds", "tune", "demo_pretrain", "--gpus"],
        ["python", "tools/bench_autotuner.py", "RECIPE", "batch.global_batch_size=N"],
    ]
