"""The command line: the only place that reads argv. Nothing heavy is imported before a command needs it."""

from everest_ds.cli.app import main

__all__ = ["main"]
