"""What one GPU can show of the equality that test_equality.py holds on gloo."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.parallel.equality import STAGES, TASKS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_stage_on_one_gpu_follows_the_plain_loop() -> None:
    command = [sys.executable, "-m", "tests.parallel.one_device"]
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cuda:0: ") == len(STAGES) * len(TASKS), done.stdout
