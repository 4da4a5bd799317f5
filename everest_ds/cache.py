"""Location of the user's cache folder, which holds files that are slow to produce but reproducible."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the path of `everest-ds` in $XDG_CACHE_HOME, or in ~/.cache if that variable is not set.

    The folder may not exist yet.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "everest-ds"
