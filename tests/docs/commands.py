"""Parser of the commands in README.md and docs/*.md: the lines of their fenced blocks."""

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
        document: path of the document that contains the command.
        text: the command without its comment, with continued lines joined.
    """

    document: str
    text: str

    @property
    def words(self) -> list[str]:
        """The words of the command, split as a shell would."""
        return shlex.split(self.text)

    @property
    def is_synopsis(self) -> bool:
        """True if the command has placeholders, so that it cannot be typed as it is."""
        return bool(_PLACEHOLDER.search(self.text))

    def __str__(self) -> str:
        return f"{self.document}: {self.text}"


def documented() -> list[Command]:
    """Return all documented commands, each once per document."""
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
    """Return the `everest-ds` command that `words` begin with, and its arguments.

    Raises:
        KeyError: there is no such command.
    """
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    return command, words


def deepspeed_example() -> str:
    """Return the DeepSpeed file that docs/parallel.md shows, and that commands name as ds_config.json."""
    guide = (ROOT / "docs/parallel.md").read_text()
    return guide.partition("```json\n")[2].partition("```")[0]
