"""Saved state on disk: its files, what makes it complete, and reading it back on any number of ranks."""
