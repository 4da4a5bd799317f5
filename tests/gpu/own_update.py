"""Our update of ZeRO-1 and 2 against DeepSpeed's own, with the buckets that it fills, on this device.

Run by `test_engine.py` as a process of its own: DeepSpeed settles on a kind of device when it is imported.
"""

from __future__ import annotations

import os
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from everest_ds.cli.alone import world_of_one
from everest_ds.config.zero_settings import ZeroSettings
from everest_ds.parallel.world import World
from tests.parallel.equality import TOLERANCE, assert_equal, engine_run, experiment

CASES = [(stage, precision) for stage in (1, 2) for precision in ("fp32", "bf16")]


def main(world: World) -> None:
    """Compare twenty steps of both; sums in bf16 are DeepSpeed's, so bf16 has one micro-batch a step."""
    from everest_ds.parallel import lean_update  # imports DeepSpeed, which collecting tests shall not

    for stage, precision in CASES:
        config = experiment("pretrain", stage, 1, precision=precision)
        one = config.batch.model_copy(update={"grad_accum_steps": 1})
        config = config.model_copy(update={"batch": one})
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
