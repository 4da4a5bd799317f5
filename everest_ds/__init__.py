"""EVEREST-DS: large-scale training of EVEREST, the masked video autoencoder of the moving tokens.

As a library (docs/library.md): `from everest_ds import load_model, read_clip`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# What the package offers by itself -> the module that has it, imported when asked for: torch takes seconds.
_LAZY = {"load_model": "everest_ds.interchange.load", "read_clip": "everest_ds.inference.views"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
