"""Our update of ZeRO-1 and 2 against DeepSpeed's own, with the buckets that it fills, on this device.

Run by `test_engine.py` as a process of its own: DeepSpeed settles on a kind of device when it is imported.
"""

from __future__ import annotations

import os
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from everest_ds.cli.alone import world_of_one
from everest_ds.config import Experiment
from everest_ds.config.zero_settings import ZeroSettings
from everest_ds.parallel.world import World
from tests.parallel.equality import TOLERANCE, assert_equal, engine_run, experiment

CASES = [(stage, precision) for stage in (1, 2) for precision in ("fp32", "bf16")]


def config_of(stage: int, precision: str) -> Experiment:
    """One micro-batch a step: DeepSpeed sums several in bf16. There, no clipping either.

    DeepSpeed's norm is a float64 one; where a clipped bf16 weight is rounded, its last bit decides.
    """
    config = experiment("pretrain", stage, 1, precision=precision)
    batch = config.batch.model_copy(update={"grad_accum_steps": 1})
    clip = config.optimizer.clip_grad_norm if precision == "fp32" else None
    optimizer = config.optimizer.model_copy(update={"clip_grad_norm": clip})
    return config.model_copy(update={"batch": batch, "optimizer": optimizer})


def main(world: World) -> None:
    """Compare twenty steps of both."""
    from everest_ds.parallel import lean_update  # imports DeepSpeed, which collecting tests shall not

    for stage, precision in CASES:
        config = config_of(stage, precision)
        ours = engine_run(world, config)
        with (
            patch.object(lean_update, "make_lean", lambda *_: None),
            patch.object(ZeroSettings, "shards_nothing", lambda *_: False),
        ):
            theirs = engine_run(world, config)
        assert_equal(ours, theirs, f"ZeRO-{stage}, {precision}", TOLERANCE)
        print(f"{world.device}: ZeRO-{stage}, {precision}: equal")


if __name__ == "__main__":
    # Kernels that sum in the same order each time: attention's atomic additions are not what is compared.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    with world_of_one() as world, sdpa_kernel(SDPBackend.MATH):
        main(world)
