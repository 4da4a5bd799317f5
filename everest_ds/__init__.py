"""EVEREST-DS: large-scale training of EVEREST, the masked video autoencoder that keeps only moving tokens.

The library interface (docs/library.md) is `from everest_ds import load_model, read_clip`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from everest_ds.inference.views import read_clip
    from everest_ds.interchange.load_model import load_model

__all__ = ["__version__", "load_model", "read_clip"]
__version__ = "0.1.0"

# Exported name -> module that defines it, imported on first use because importing torch takes seconds.
_LAZY = {"load_model": "everest_ds.interchange.load_model", "read_clip": "everest_ds.inference.views"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
