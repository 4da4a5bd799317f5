"""The memory part: peak memory, predicted and measured, of eager steps that save or need the most memory."""

from __future__ import annotations

from everest_ds.parallel.world_of_one import world_of_one
from gpu_check.cases import Case
from gpu_check.record import Record
from gpu_check.steps import measure_case

CASES = (
    Case("finetune", "vit_large", 16, ("recompute.mode=full",)),
    Case("finetune", "vit_large", 16, ("recompute.mode=mlp",)),
    Case("finetune", "vit_large", 16, ("recompute.mode=attention",)),
    Case("finetune", "vit_large", 16, ("tokens.selection=none",)),
    Case("finetune", "vit_huge", 8, ("recompute.mode=blocks",)),
    Case("pretrain", "vit_base", 64, ("parallelism.zero_stage=3",)),
)


def run(record: Record) -> None:
    """Measure all cases in few steps, because only their memory matters."""
    with world_of_one() as world:
        for case in CASES:
            eager = case._replace(overrides=(*case.overrides, "model.compile=false"))
            measure_case(record, eager, world, name=case.name, steps=2, warm_up=2)
