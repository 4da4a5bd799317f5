"""Tests of the checks of a run's input files, which are made before training however it is started."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from everest_ds.config import Experiment
from everest_ds.data.video_list import read_class_names
from everest_ds.errors import CheckpointError, EverestError
from everest_ds.training.input_files import (
    check_evaluation_inputs,
    check_initial_weights_exist,
    class_names,
    manifest_of,
)
from tests.cli.test_cli import run_main, write_config
from tests.ranks import run_ranks
from tests.training.faults import outcome
from tests.training.runs import experiment


def written(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def finetuning(data: Path, folder: Path, **files: str | None) -> Experiment:
    return experiment(data, folder / "run", "finetune", data=dict(files))


def refusal(check: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(EverestError) as caught:
        check(*arguments)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_the_names_are_those_of_the_file_or_else_numbers(motion_data: Path, tmp_path: Path) -> None:
    config = finetuning(motion_data, tmp_path)
    assert class_names(config) == read_class_names(motion_data / "classes.txt")
    assert class_names(finetuning(motion_data, tmp_path, class_names=None)) == list("012345")
    check_evaluation_inputs(config)


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize(
    ("key", "text", "says"),
    [
        ("class_names", "run\njump\nswim\nfly\n", "ConfigError: {}: the number of names differs from"),
        ("class_names", "a\nb\nc\nd\ne\nf\ng\n", "given: 7 names; allowed: 6 names, one per line"),
        ("class_names", "\n\n", "DataError: {}: no class names"),
        ("class_names", "a\nb\nc\na\ne\nb\n", "DataError: {}: class names are repeated; given: a, b"),
        ("test", "a.mp4 0\nb.mp4 6\n", "DataError: {}:2: label out of range; given: 6; allowed: 0..5"),
        ("test", "# nothing\n", "DataError: {}: the manifest is empty"),
        ("val", "a.mp4 3\nb.mp4\n", "DataError: {}:2: no label; given: 'b.mp4'"),
    ],
)
def test_a_file_that_contradicts_the_config_is_refused_also_by_a_plan(
    motion_data: Path, tmp_path: Path, key: str, text: str, says: str, planned: bool
) -> None:
    file = written(tmp_path, "file.txt", text)
    config = finetuning(motion_data, tmp_path, **{key: file})
    assert says.format(file) in refusal(check_evaluation_inputs, config, planned)


@pytest.mark.parametrize("key", ["class_names", "test", "val"])
def test_a_file_that_is_missing_is_refused_unless_the_run_is_only_planned(
    motion_data: Path, tmp_path: Path, key: str
) -> None:
    config = finetuning(motion_data, tmp_path, **{key: str(tmp_path / "none.txt")})
    message = refusal(check_evaluation_inputs, config)
    assert message.startswith(f"DataError: data.{key}: no such") and f"given: {tmp_path}/none.txt" in message
    check_evaluation_inputs(config, planned=True)


def test_files_that_pretraining_does_not_read_are_not_asked_for(motion_data: Path, tmp_path: Path) -> None:
    nowhere = {key: str(tmp_path / "none.txt") for key in ("val", "test", "class_names")}
    check_evaluation_inputs(experiment(motion_data, tmp_path, data=nowhere))


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_missing_manifest_names_its_key_and_the_command_that_writes_it(
    motion_data: Path, tmp_path: Path, split: str
) -> None:
    folder = tmp_path / "my videos"
    folder.mkdir()
    message = refusal(manifest_of, finetuning(motion_data, tmp_path, **{split: str(folder)}), split)
    assert f"data.{split}: this folder is not a frame store; given: {folder}" in message
    assert f"`everest-ds data index '{folder}' --out LISTS`" in message
    assert (f"data.{split}=null" in message) == (split != "train")
    message = refusal(manifest_of, finetuning(motion_data, tmp_path, **{split: None}), split)
    assert f"ConfigError: data.{split} is not set; fix: name a manifest: data.{split}=" in message


def test_initial_weights_must_exist_unless_the_run_resumes(motion_data: Path, tmp_path: Path) -> None:
    config = experiment(motion_data, tmp_path / "run", "finetune", model={"init_from": "runs/none"})
    with pytest.raises(CheckpointError, match="model.init_from: no weights found; given: .*/runs/none; all"):
        check_initial_weights_exist(config)
    (tmp_path / "run" / "checkpoints" / "step-00000004").mkdir(parents=True)
    check_initial_weights_exist(config)


@pytest.mark.parametrize(
    ("files", "code", "says"),
    [
        ({"class_names": "names.txt"}, 2, "names.txt: the number of names differs from model.num_classes"),
        ({"test": "list.txt"}, 3, "list.txt:1: label out of range; given: 17"),
    ],
)
def test_a_dry_run_a_submission_and_a_start_refuse_the_same_files(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    motion_data: Path,
    tmp_path: Path,
    files: dict[str, str],
    code: int,
    says: str,
) -> None:
    written(tmp_path, "names.txt", "one\ntwo\n")
    written(tmp_path, "list.txt", "a.mp4 17\n")
    wrong = [f"data.{key}={tmp_path / name}" for key, name in files.items()]
    arguments = ["finetune", str(write_config(motion_data, tmp_path, "finetune")), *wrong]
    monkeypatch.setenv("PATH", "/nowhere")  # no SLURM
    for command in (
        [*arguments, "--dry-run"],
        ["submit", *arguments, "--ntasks-per-node", "1", "--dry-run"],
        [*arguments, "--nproc", "2"],
    ):
        assert run_main(monkeypatch, *command) == code
        error = capsys.readouterr().err
        assert says in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "finetune" / "checkpoints").exists()


def test_ranks_of_another_launcher_refuse_them_and_leave_the_folder_free(
    motion_data: Path, tmp_path: Path
) -> None:
    config = finetuning(motion_data, tmp_path, class_names=written(tmp_path, "names.txt", "one\n"))
    messages = run_ranks(outcome, 2, config)
    assert messages[0] == messages[1] and "given: 1 names; allowed: 6 names" in messages[0]
    assert not (tmp_path / "run" / "config.yaml").exists()
