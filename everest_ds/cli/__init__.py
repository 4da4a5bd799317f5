"""The command line: the only package that reads argv. Commands import heavy libraries on demand."""

from everest_ds.cli.app import main

__all__ = ["main"]
