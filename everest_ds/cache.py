"""The folder of a user's machine for what can be made again but takes time."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `everest-ds` in $XDG_CACHE_HOME, or in ~/.cache where that is not set. It may not exist yet."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "everest-ds"
