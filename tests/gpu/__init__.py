"""Tests that need a CUDA device; `make test-gpu` and `pytest -m gpu` collect only this folder."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

# Every module of this folder sets this as its `pytestmark`.
ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run_alone(module: str) -> str:
    """Run a module in its own process and return its output.

    DeepSpeed fixes the kind of device of a process when it is imported.
    """
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-m", module], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
