"""Tests of every command in README.md and docs/*.md: each is run, dry-run, or only parsed."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from everest_ds.config import load_experiment
from everest_ds.data.synthetic import SyntheticSpec, synthesize
from tests.cli.test_cli import run_main
from tests.docs.commands import ROOT, Command, deepspeed_example, documented, find_command

EVEREST = [command for command in documented() if command.text.startswith("everest-ds ")]
OTHERS = [command for command in documented() if command not in EVEREST]
# Documents whose commands other tests run in order.
RUN_ELSEWHERE = {"docs/library.md", "docs/tune.md", "docs/study.md"}
# Commands that are only parsed, with the reason or with the test that runs them.
ONLY_PARSED = {
    "data index k400": "needs Kinetics; tests/data/official/test_official.py has the authors' files",
    "data synth": "makes a whole data set; tests/data/test_synthetic.py, make demo",
    "checkpoint convert": "tests/docs/test_library.py",
    "predict": "tests/docs/test_library.py",
    "logs": "follows a job until it ends; tests/slurm",
    "cancel": "needs a job; tests/slurm",
    "sweep": "needs a sweep that has run; tests/slurm",
    "jobs": "needs SLURM; tests/cli/test_jobs.py, tests/slurm",
    "submit": "is dry-run in tests/cli/test_submit.py; it asks SLURM",
    "report --measured": "needs the file of a measurement; tests/cli/test_profile.py",
    "profile": "counts a full-size model for half a minute; tests/cli/test_profile.py",
    "tune": "tests/tuning",
}


@pytest.mark.parametrize("command", EVEREST, ids=str)
def test_the_command_line_takes_it(command: Command) -> None:
    found, arguments = find_command(command.words[1:])
    if not command.is_synopsis:
        found.make_context("everest-ds", list(arguments))
        return
    options = {name for parameter in found.params for name in parameter.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", command.text)) <= options


TRAINING = [
    command for command in EVEREST if command.words[1] in ("pretrain", "finetune") and not command.is_synopsis
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the documents assume the reader to have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "my.yaml").write_text("base: k400_pretrain_vit_base\n")
    (tmp_path / "ds_config.json").write_text(deepspeed_example())
    (tmp_path / "pre.yaml").write_text("base: k400_pretrain_vit_base\n")
    (tmp_path / "fine.yaml").write_text("base: k400_finetune_vit_base\n")
    (tmp_path / "lists").mkdir()
    for task in ("pretrain", "finetune"):  # as `data index my_videos --out lists` writes them
        (tmp_path / "lists" / f"{task}.yaml").write_text(f"base: ucf101_{task}_vit_base\n")
    return tmp_path


@pytest.mark.parametrize("command", TRAINING, ids=str)
def test_a_training_command_dry_runs(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [word for word in command.words[1:] if word != "--dry-run"]
    if command.words[2] == "my.yaml" and command.words[1] == "finetune":
        shutil.copy("fine.yaml", "my.yaml")
    assert run_main(monkeypatch, *words, "--dry-run") == 0


@pytest.mark.parametrize("command", OTHERS, ids=str)
def test_another_programs_command_names_what_there_is(command: Command, folder: Path) -> None:
    program, *words = command.words
    if program == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text()
    elif program == "tools/local_slurm":
        assert f'"{words[0]}"' in (ROOT / "tools/localslurm/main.py").read_text()
    elif program.startswith("tools/"):
        assert os.access(ROOT / program, os.X_OK)
    elif program == "sbatch":
        script, *arguments = [word for word in words if not word.startswith("-") and word != "..."]
        assert (ROOT / script).is_file()
        if not arguments[0].startswith("runs/"):
            task = "fine.yaml" if "finetune" in script else arguments[0]
            load_experiment(task, [word for word in arguments if "=" in word])
    elif program == "python":
        assert words[:2] == ["-m", "everest_ds"] or (ROOT / words[0]).is_file()
    else:
        assert program in ("pip", "torchrun"), f"nothing here checks {program}"


def runnable() -> Iterator[Command]:
    for command in EVEREST:
        words = " ".join(command.words[1:])
        skipped = words.startswith(tuple(ONLY_PARSED)) or command in TRAINING or command.is_synopsis
        if not skipped and command.document not in RUN_ELSEWHERE:
            yield command


@pytest.mark.slow
def test_what_one_machine_can_run_runs_in_the_order_of_the_documents(
    folder: Path, motion_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands run in the documents' order, on tiny videos and short runs of the demo recipes."""
    long = SyntheticSpec(num_frames=64, size=32)  # 16 frames at stride 4 need 64
    synthesize(folder / "my_videos", {"train": 12, "val": 6}, long, workers=1)
    shutil.copy(next(folder.rglob("*.mp4")), "clip.mp4")
    short = [f"data.{split}={motion_data}/{split}.txt" for split in ("train", "val", "test")]
    tiny = ["schedule.epochs=1", "schedule.warmup_epochs=0", "batch.micro_batch_size=4", "data.num_workers=0"]
    pre = ["pretrain", "demo_pretrain", short[0], *tiny, "run.dir=runs/pre", "--nproc", "1"]
    assert run_main(monkeypatch, *pre) == 0
    fine = ["finetune", "demo_finetune", *short, *tiny, "model.init_from=runs/pre", "run.dir=runs/fine"]
    names = f"data.class_names={motion_data}/classes.txt"
    assert run_main(monkeypatch, *fine, names, "--nproc", "1") == 0
    for name in ("a", "b", "demo/finetune", "demo/finetune_64f"):
        shutil.copytree("runs/fine", f"runs/{name}")
    for command in runnable():
        words = re.sub(r"--nproc \d+", "--nproc 1", " ".join(command.words[1:])).split()
        code = run_main(monkeypatch, *words)
        assert code == (0 if words[0] != "doctor" else code), command


def test_exceptions_are_of_commands_that_are_documented() -> None:
    texts = [" ".join(command.words[1:]) for command in EVEREST]
    unused = [prefix for prefix in ONLY_PARSED if not any(text.startswith(prefix) for text in texts)]
    assert unused == []
