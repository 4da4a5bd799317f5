"""Helpers that run a function in a real pseudo-terminal and return the lines that remain on its screen."""

from __future__ import annotations

import os
import pty
import re
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from fcntl import ioctl
from termios import TIOCSWINSZ

from everest_ds.console import stderr_console

_CONTROL = re.compile(r"\x1b\[\??([0-9;]*)([A-Za-z])")


def screen_of(function: Callable[[], None], columns: int) -> list[str]:
    """Call `function` in a terminal of `columns` columns, and return the lines that its screen shows."""
    child, terminal = pty.fork()
    if child == 0:
        _be_child(function, columns)
    received = b""
    with suppress(OSError):  # Linux reports the end of a terminal's output as an I/O error
        while chunk := os.read(terminal, 65536):
            received += chunk
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert status == 0, received.decode()
    return draw(received.decode(), columns)


def _be_child(function: Callable[[], None], columns: int) -> None:
    """Run `function` with the terminal as stdout and stderr, and end the process."""
    code = 1
    try:
        ioctl(2, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.environ.pop("COLUMNS", None)
        os.environ["TERM"] = "xterm"
        for number, name in ((1, "stdout"), (2, "stderr")):
            setattr(sys, name, open(number, "w", buffering=1, closefd=False))
        stderr_console.cache_clear()
        function()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def draw(text: str, columns: int) -> list[str]:
    """Return the lines of a screen, after the control sequences that rich uses."""
    lines, row, column, position = [""], 0, 0, 0
    while position < len(text):
        control = _CONTROL.match(text, position)
        character, position = text[position], control.end() if control else position + 1
        if control:
            if control[2] == "K":
                lines[row] = "" if control[1] == "2" else lines[row][:column]
            elif control[2] == "A":
                row -= int(control[1] or 1)
        elif character == "\r":
            column = 0
        elif character == "\n":
            row, column = row + 1, 0
        else:
            if column == columns:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + character + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]
