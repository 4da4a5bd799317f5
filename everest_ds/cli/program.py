"""Running and ending a command-line program: an error of the user is one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import typer

from everest_ds.errors import EverestError, ExitCode


def run_program(function: Callable[..., Any]) -> None:
    """Run one function as a command-line program, as the scripts in tools/ do."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(function)
    run_app(app)


def run_app(app: typer.Typer) -> None:
    """Run a command line, and turn an `EverestError` into one line on stderr and its exit code."""
    try:
        app()
    except EverestError as error:
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not error.on_every_rank:
            label = "stopped" if error.exit_code == ExitCode.STOPPED else "error"
            origin = "" if rank == "0" else f"[rank {rank}] "
            print(f"{origin}{label}: {error}", file=sys.stderr)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        _leave(128 + 2)


def _leave(code: int) -> None:
    # A normal exit of the interpreter can block on threads of a process group whose other ranks are gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if "WORLD_SIZE" in os.environ else sys.exit(code)
