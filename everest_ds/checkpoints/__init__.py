"""Checkpoints on disk: their files, their integrity checks, and reading on any number of ranks."""
