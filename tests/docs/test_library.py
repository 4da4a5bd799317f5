"""Tests of docs/library.md: its code runs from the first line to the last, on small weights and videos."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import everest_ds
from tests.cli.test_cli import run_main
from tests.interchange import systems

GUIDE = Path(__file__).parents[2] / "docs" / "library.md"
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# The originals save the arguments of their scripts with the weights.
SCRIPT = argparse.Namespace(num_frames=8, input_size=64, sampling_rate=2)
# The guide's recipe is for the published ViT-B; the weights here are smaller.
SMALLER = ("model.backbone=vit_tiny", *systems.CLIP)


@pytest.fixture
def workplace(motion_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the guide's inputs: videos, and small random weights in the originals' layouts."""
    shutil.copytree(motion_data / "test", tmp_path / "my_videos")
    (tmp_path / "my_videos" / "00000.mp4").rename(tmp_path / "my_videos" / "clip.mp4")
    shutil.copy(motion_data / "classes.txt", tmp_path)
    states = {
        "videomae.pth": systems.finetuned_state(systems.classifier()),
        "videomae_pretrained.pth": systems.pretrained_state(systems.autoencoder()),
        "mvd.pth": systems.mvd_state(systems.autoencoder()),
    }
    for name, state in states.items():
        torch.save({"model": state, "args": SCRIPT}, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps() -> Iterator[tuple[str, str]]:
    """Yield the single commands and whole Python blocks of the guide, in order."""
    for language, text in BLOCK.findall(GUIDE.read_text()):
        if language == "python":
            yield language, text
        elif not language:
            yield from (("command", line) for line in text.splitlines())


def test_the_guide_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {}
    for kind, text in steps():
        if kind == "python":
            exec(compile(text, str(GUIDE), "exec"), names)
            continue
        program, *arguments = shlex.split(text, comments=True)
        if program == "everest-ds":
            arguments += SMALLER if "_from_dense" in text else ()
            assert run_main(monkeypatch, *arguments) == 0, (text, capsys.readouterr().err)
        else:
            assert text == "pip install ."
    lines = (workplace / "predictions.csv").read_text().splitlines()
    assert len(lines) == 13 and lines[0].startswith("video,class,probability_pct")
    assert (workplace / "kept.png").read_bytes().startswith(b"\x89PNG")


def test_the_guide_imports_only_public_names() -> None:
    imported = [
        (node.module, alias.name)
        for kind, text in steps()
        if kind == "python"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("everest_ds")
        for alias in node.names
    ]
    assert ("everest_ds", "load_model") in imported
    assert {module for module, _ in imported} == {"everest_ds"}
    assert {name for _, name in imported} <= set(everest_ds.__all__)
    assert all(
        callable(getattr(everest_ds, name)) for name in everest_ds.__all__ if not name.startswith("__")
    )


def test_three_commands_come_first() -> None:
    first = BLOCK.search(GUIDE.read_text())
    assert first is not None and first[2].count("\n") == 3
