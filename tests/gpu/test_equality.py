"""Tests that every ZeRO stage trains like the plain loop on one GPU.

tests/parallel/test_equality.py compares several ranks, on CPUs.
"""

from __future__ import annotations

from tests.gpu import ON_CUDA, run_alone
from tests.parallel.equality import STAGES, TASKS

pytestmark = ON_CUDA


def test_every_stage_on_one_gpu_follows_the_plain_loop() -> None:
    output = run_alone("tests.gpu.one_device")
    assert output.count("cuda:0: ") == len(STAGES) * len(TASKS), output
