"""Tests of the table of VideoMAE's and EVEREST's flags: it lists them all, and our keys for them exist."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
import typer

from everest_ds.cli.app import app
from everest_ds.config import Experiment, flatten, load_experiment
from everest_ds.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "VIDEOMAE_CODE": {"P": "run_mae_pretraining.py", "F": "run_class_finetuning.py"},
    "EVEREST_CODE": {"P": "run_ms_pretraining.py", "F": "run_class_finetuning.py"},
}
KEY = re.compile(r"[a-z]+\.[a-z_0-9]+")


def rows(document: str) -> list[list[str]]:
    """Return the cells of a document's tables of flags."""
    lines = (ROOT / document).read_text().splitlines()
    flags = (line for line in lines if line.startswith("| `--"))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in flags]


def codes(cell: str) -> list[str]:
    return [word for code in re.findall(r"`([^`]+)`", cell) for word in code.split()]


def accepted(setting: str) -> bool:
    """Return whether a pre-training or a fine-tuning recipe accepts `setting`."""
    for recipe in ("k400_pretrain_vit_base", "k400_finetune_vit_base"):
        try:
            load_experiment(recipe, [setting])
        except ConfigError:
            continue
        return True
    return False


@pytest.mark.parametrize("document", ["docs/coming-from-videomae.md", "README.md"])
def test_our_keys_exist_and_take_the_values_shown(document: str) -> None:
    keys = {key for key, _ in flatten(Experiment(task="pretrain").model_dump())}
    words = [word for row in rows(document) for word in codes(row[-1]) if KEY.match(word)]
    assert words
    assert [word for word in words if word.split("=")[0] not in keys] == []
    assert [word for word in words if "=" in word and not accepted(word)] == []


def test_our_options_exist() -> None:
    options = {
        name
        for command in typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
        for parameter in command.params
        for name in parameter.opts
    }
    used = {word for row in rows("docs/coming-from-videomae.md") for word in codes(row[-1])}
    theirs = {codes(row[0])[0] for row in rows("docs/coming-from-videomae.md")}
    assert {word for word in used if word.startswith("--")} <= options | theirs


@pytest.mark.parametrize("variable", SCRIPTS)
@pytest.mark.parametrize("phase", ["P", "F"])
def test_every_flag_of_theirs_is_there_and_no_other(variable: str, phase: str) -> None:
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a clone")
    script = Path(os.environ[variable]) / SCRIPTS[variable][phase]
    listed = {codes(row[0])[0] for row in rows("docs/coming-from-videomae.md") if phase in row[1].split()}
    flags = flags_of(script)
    assert flags <= listed
    if variable == "EVEREST_CODE":  # EVEREST has all flags of VideoMAE, so the table has no others
        assert flags == listed


def flags_of(script: Path) -> set[str]:
    calls = (node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call))
    added = (call for call in calls if getattr(call.func, "attr", "") == "add_argument")
    return {str(arg.value) for call in added for arg in call.args if isinstance(arg, ast.Constant)}
