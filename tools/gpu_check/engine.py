"""The engine part: steps of the shipped engine in both phases, other sizes and stages, and kernels.

Traces come last: once a process has traced, every later kernel launch of that process takes longer.
"""

from __future__ import annotations

from everest_ds.parallel.world_of_one import world_of_one
from gpu_check.cases import Case
from gpu_check.record import Record
from gpu_check.steps import measure_case

# The most important cases come first, because time may run out.
CASES = (
    Case("pretrain", "vit_large", 64),
    Case("finetune", "vit_large", 16),
    Case("pretrain", "vit_large", 128),
    Case("finetune", "vit_large", 32),
    Case("pretrain", "vit_base", 64),
    Case("finetune", "vit_base", 32),
    Case("pretrain", "vit_large", 64, ("parallelism.zero_stage=3",)),
    Case("pretrain", "vit_large", 64, ("tokens.selection=tube",)),
)
TRACED = (
    Case("pretrain", "vit_large", 64, trace="pretrain.trace.json.gz"),
    Case("finetune", "vit_large", 16, trace="finetune.trace.json.gz"),
)


def run(record: Record) -> None:
    """Measure the steps of all cases, then trace the most important ones."""
    with world_of_one() as world:
        for case in CASES:
            measure_case(record, case, world)
        for case in TRACED:
            measure_case(record, case, world, name=f"{case.name}, traced")
