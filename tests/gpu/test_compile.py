"""Tests of compiled blocks on a GPU, where they are the default."""

from __future__ import annotations

from tests.gpu import ON_CUDA, run_alone
from tests.gpu.compiled import CASES

pytestmark = ON_CUDA


def test_compiled_blocks_train_as_eager_ones_on_a_gpu() -> None:
    output = run_alone("tests.gpu.compiled")
    assert output.count("cuda:0: ") == len(CASES), output
