"""The `everest-ds` program: the table of its commands, and the group that imports only the one invoked."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from copy import copy
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from everest_ds import __version__
from everest_ds.cli.careful_command import CarefulCommand
from everest_ds.cli.program import run_app


class CommandGroup(NamedTuple):
    """A command, such as `data`, that groups other commands."""

    help: str
    commands: dict[str, str]
    hidden: bool = False


Row = str | CommandGroup

# Command -> `module:function` in everest_ds/cli, in the order of the help.
COMMANDS: dict[str, Row] = {
    "pretrain": "train:pretrain",
    "finetune": "train:finetune",
    "evaluate": "train:evaluate",
    "features": "predict:features",
    "probe": "predict:probe",
    "predict": "predict:predict",
    "profile": "profile:profile",
    "tune": "tune:tune",
    "report": "report:report",
    "submit": "submit:submit",
    "jobs": "jobs:jobs",
    "logs": "jobs:logs",
    "cancel": "jobs:cancel",
    "requeue": "jobs:requeue",
    "sweep": "jobs:sweep",
    "visualize": "predict:visualize",
    "recipes": "recipes:recipes",
    "keys": "keys:keys",
    "doctor": "preflight:doctor",
    "preflight": "preflight:preflight",
    "data": CommandGroup(
        "Create, index, check, re-encode, pack and cache data sets of videos.",
        {
            "synth": "data:synth",
            "index": "data:index",
            "reencode": "data:reencode",
            "pack": "pack:pack",
            "cache": "fill:cache",
            "check": "data:check",
        },
    ),
    "checkpoint": CommandGroup(
        "Inspect, verify, export and convert checkpoints. Resuming needs no conversion: a run resumes from"
        " any of its checkpoints with any number of ranks, ZeRO stage and tensor-parallel degree.",
        {
            "convert": "checkpoint:convert",
            "inspect": "checkpoint:inspect",
            "verify": "checkpoint:verify",
            "export": "checkpoint:export",
        },
    ),
    "job": CommandGroup(
        "Internal commands that the scripts in slurm/ run around a job's ranks.",
        {"begin": "job:begin", "end": "job:end", "candidate": "job:candidate"},
        hidden=True,
    ),
}
# Commands that pass options that they do not define on to sbatch, instead of refusing them.
_PASSES_ON_OPTIONS = {"submit"}


class LazyGroup(TyperGroup):
    """A group of commands that imports the module of a command only when that command is used."""

    def __init__(self, rows: Mapping[str, Row] = COMMANDS, **attributes: Any) -> None:
        super().__init__(**attributes)
        commands: Any = _LoadedOnAccess(rows)  # read only, where TyperGroup declares a mutable mapping
        self.rows, self.commands = rows, commands

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands, in the order of the table."""
        return list(self.rows)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help of the group without importing its commands."""
        listing = copy(self)
        listing.commands = self.listing()
        super(LazyGroup, listing).format_help(ctx, formatter)

    def listing(self) -> dict[str, Any]:
        """Return the commands with their help, but without options: the help is read from the source text."""
        return {name: _listed(name, row) for name, row in self.rows.items()}


class _LoadedOnAccess(Mapping[str, Any]):
    """The commands of a group by name; looking one up imports its module."""

    def __init__(self, rows: Mapping[str, Row]) -> None:
        self._rows = rows

    def __getitem__(self, name: str) -> Any:
        row = self._rows[name]
        if isinstance(row, CommandGroup):
            return LazyGroup(row.commands, name=name, help=row.help, hidden=row.hidden, no_args_is_help=True)
        module, _, function = row.partition(":")
        single = typer.Typer(add_completion=False, rich_markup_mode="rich")
        settings = {"ignore_unknown_options": name in _PASSES_ON_OPTIONS}
        add = single.command(name, cls=CarefulCommand, context_settings=settings)
        add(getattr(import_module(f"{__package__}.{module}"), function))
        return typer.main.get_command(single)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def _listed(name: str, row: Row) -> TyperCommand:
    if isinstance(row, CommandGroup):
        return TyperCommand(name, help=row.help, hidden=row.hidden)
    module, _, function = row.partition(":")
    source = ast.parse(Path(__file__).with_name(f"{module}.py").read_text())
    found = (node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return TyperCommand(name, help=ast.get_docstring(next(found)))


app = typer.Typer(
    name="everest-ds",
    cls=LazyGroup,
    help="Train EVEREST, a masked video autoencoder that keeps only the tokens that change, at scale.",
    epilog="First:  everest-ds data synth runs/demo/data,  then  everest-ds pretrain demo_pretrain --nproc 2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; report a user's mistake in one line on stderr, with its exit code."""
    run_app(app)
