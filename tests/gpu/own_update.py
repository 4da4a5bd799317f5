"""Comparison of EVEREST-DS's update at ZeRO-1 and 2 with DeepSpeed's own bucketed update, on this device.

`test_engine.py` runs this module in its own process, because DeepSpeed fixes the kind of device on import.
"""

from __future__ import annotations

import os
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from everest_ds.config import Experiment
from everest_ds.config.zero_settings import ZeroSettings
from everest_ds.parallel.world import World
from everest_ds.parallel.world_of_one import world_of_one
from tests.parallel.equality import TOLERANCE, assert_equal, engine_run, experiment

CASES = [(stage, precision) for stage in (1, 2) for precision in ("fp32", "bf16")]


def config_of(stage: int, precision: str) -> Experiment:
    """Return a run in which both updates should give equal weights.

    It has one micro-batch per step, because DeepSpeed would sum several in bf16. In bf16 it does not clip:
    DeepSpeed computes its norm in float64, and the norm's last bit decides how a clipped weight is rounded.
    """
    config = experiment("pretrain", stage, 1, precision=precision)
    batch = config.batch.model_copy(update={"grad_accum_steps": 1})
    clip = config.optimizer.clip_grad_norm if precision == "fp32" else None
    optimizer = config.optimizer.model_copy(update={"clip_grad_norm": clip})
    return config.model_copy(update={"batch": batch, "optimizer": optimizer})


def main(world: World) -> None:
    """Compare the weights of both updates after twenty steps."""
    from everest_ds.parallel import lean_update  # imports DeepSpeed, which must not happen during collection

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
    # Deterministic kernels: otherwise the atomic additions of attention would make the weights differ.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True, warn_only=True)
    with world_of_one() as world, sdpa_kernel(SDPBackend.MATH):
        main(world)
