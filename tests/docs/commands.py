"""The commands of README.md and docs/*.md: what stands in their fenced blocks, line by line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import typer

from everest_ds.cli.app import app

ROOT = Path(__file__).parents[2]
PROGRAMS = ("everest-ds", "make", "pip", "python", "sbatch", "torchrun", "tools/")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_CAPTURED = re.compile(r'^(?:\w+=|eval ")\$\((.*)\)"?$')
_SHELLS = ("", "bash", "sh", "console")
_PLACEHOLDER = re.compile(r"[\[\]{}|]|\.\.\.|\b[A-Z_]{3,}\b")


class Command(NamedTuple):
    """One documented command.

    Attributes:
        document: where it stands.
        text: without its comment, lines joined.
    """

    document: str
    text: str

    @property
    def words(self) -> list[str]:
        """As a shell splits it."""
        return shlex.split(self.text)

    @property
    def is_synopsis(self) -> bool:
        """It says what could be typed, not what to type."""
        return bool(_PLACEHOLDER.search(self.text))

    def __str__(self) -> str:
        return f"{self.document}: {self.text}"


def documented() -> list[Command]:
    """All of them, each once a document."""
    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = (one for path in documents for one in _commands(path))
    return list(dict.fromkeys(found))


def _commands(path: Path) -> Iterator[Command]:
    for language, block in _FENCE.findall(path.read_text()):
        if language not in _SHELLS:
            continue
        for line in block.replace("\\\n", " ").splitlines():
            text = " ".join(re.sub(r"(^|\s)#.*", "", line).removeprefix("$ ").split())
            text = _CAPTURED.sub(r"\1", text)
            if text.startswith(PROGRAMS):
                yield Command(str(path.relative_to(ROOT)), text)


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command of `everest-ds` that `words` name, and its arguments.

    Raises:
        KeyError: there is none.
    """
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command, words
