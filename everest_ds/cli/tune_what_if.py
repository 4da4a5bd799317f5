"""`everest-ds tune --what-if`: the search over numbers of GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from everest_ds.cli.output import progress_of
from everest_ds.cli.tune_cluster import cluster_of
from everest_ds.config import Experiment
from everest_ds.errors import EverestError, UsageError
from everest_ds.tuning.batches import keep_global_batch
from everest_ds.tuning.search import Candidate, Options, search
from everest_ds.tuning.what_if import WhatIf, ask_what_if

NUMBERS = tuple(2**power for power in range(11))


def ask(
    config: Experiment, gpu: str | None, interconnect: str | None, options: Options, num_gpus: int
) -> tuple[str, list[WhatIf]]:
    """What is asked, for people, and the answers, all with the global batch of `num_gpus`.

    Raises:
        UsageError: no GPU is named, or nothing fits on any number of them.
    """
    if gpu is None:
        raise UsageError("--what-if needs a GPU that there are many of", fix="--gpu h100-80gb")
    config = keep_global_batch(config, num_gpus, options.global_batch)
    everything = replace(options, global_batch=None, exhaustive=True)

    def ranked(number: int) -> Sequence[Candidate]:
        try:
            return search(config, cluster_of(gpu, number, None, interconnect), everything).ranked
        except EverestError:  # the batch cannot be split so often: no candidates
            return []

    rows = []
    with progress_of("what if", len(NUMBERS)) as on_progress:
        for done, number in enumerate(NUMBERS, 1):
            rows += ask_what_if(ranked, [number])
            on_progress(done)
    if not rows:
        raise UsageError("--what-if: nothing fits on 1 to 1,024 GPUs", given=gpu)
    batch = config.batch.global_batch_size
    return f"{config.model.backbone}, {config.task}, {batch} clips a step, on {gpu}", rows
