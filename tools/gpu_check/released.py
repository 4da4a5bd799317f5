"""The comparison of our engine and our plain loop with the released EVEREST and VideoMAE, on one GPU.

All contenders take turns on the same clips. The module runs tools/bench_step.py without its command line;
tools/bench_contenders.py defines the step of each contender. A contender that runs out of memory gets a row
with that failure, and the others continue.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_step
import torch
from peers import load_peer

from everest_ds.parallel.world import World
from everest_ds.parallel.world_of_one import world_of_one
from gpu_check.cases import Case
from gpu_check.record import Record, Row, start_afresh

# VideoMAE keeps the attention weights of all tokens: 6.5 GB per clip to fine-tune ViT-L.
CASES = (
    Case("pretrain", "vit_large", 64),
    Case("finetune", "vit_large", 8),
    Case("pretrain", "vit_base", 64),
    Case("finetune", "vit_base", 16),
)
# The peers' code is fixed to 224 pixels, and its smallest model is ViT-S.
_TINY = (Case("pretrain", "vit_small", 1), Case("finetune", "vit_small", 1))
_PEERS = ("everest", "videomae")
_ROUNDS, _WARM_UP = 8, 3
_CASE_S = 18.0


def run(record: Record) -> None:
    """Measure all cases; each has a row with the ratios of step times to our engine's."""
    session = record.session
    if session.peers is None:
        record.add(
            "released systems", {"left_out": "their files are missing: `prepare` copies them from clones"}
        )
        return
    with world_of_one() as world:
        for case in _TINY if session.tiny else CASES:
            _measure(record, case, session.peers, world)


def _measure(record: Record, case: Case, peers: Path, world: World) -> None:
    rounds, warm_up = (2, 1) if record.session.tiny else (_ROUNDS, _WARM_UP)
    plan = bench_step.Plan([case.config(tiny=False)], rounds, warm_up)
    results: list[dict[str, Any]] = []

    def compare() -> Row:
        with torch.device(world.device):  # a ViT-L takes seconds to initialise on the host
            loaded = [load_peer(name, peers / name, plan.config) for name in _PEERS]
        results.append(bench_step.run(plan, world, loaded, rates=False, profile_step=False))
        return {"ratios": results[0]["ratios"]}

    record.measure(case.name, compare, needs_s=_CASE_S)
    for result in results:
        for row in result["contenders"]:
            record.add(f"{case.name}: {row['contender']}", row)
    results.clear()
    start_afresh()
