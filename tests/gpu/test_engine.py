"""Tests of the engine's update on one GPU: the weights of DeepSpeed's update, and one host wait per step."""

from __future__ import annotations

import re

from tests.gpu import ON_CUDA, run_alone
from tests.gpu.own_update import CASES
from tests.gpu.waits import STAGES
from tests.parallel.equality import TASKS

pytestmark = ON_CUDA


def test_the_lean_update_gives_deepspeeds_own_weights() -> None:
    output = run_alone("tests.gpu.own_update")
    assert output.count("cuda:0: ") == len(CASES), output


def test_the_host_waits_once_in_a_step() -> None:
    output = run_alone("tests.gpu.waits")
    assert re.findall(r"waits: (\d+)", output) == ["1"] * len(STAGES) * len(TASKS), output
