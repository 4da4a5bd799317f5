"""`everest-ds tune --what-if`: repeat the search for 1 to 1,024 GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from everest_ds.config import Experiment
from everest_ds.console import progress_of
from everest_ds.errors import EverestError, UsageError
from everest_ds.tuning.batches import keep_global_batch
from everest_ds.tuning.cluster import cluster_of
from everest_ds.tuning.scaling import WhatIf, ask_what_if
from everest_ds.tuning.search import Candidate, Options, search

NUMBERS = tuple(2**power for power in range(11))


def ask(
    config: Experiment, gpu: str | None, interconnect: str | None, options: Options, num_gpus: int
) -> tuple[str, list[WhatIf]]:
    """Search every number of GPUs with the same global batch, that of `num_gpus`.

    Returns:
        A human-readable subject of the search, and its results.

    Raises:
        UsageError: no GPU type is given, or no candidate fits on any number of GPUs.
    """
    if gpu is None:
        raise UsageError("--what-if was given without --gpu", fix="name a GPU type, such as --gpu h100-80gb")
    config = keep_global_batch(config, num_gpus, options.global_batch)
    everything = replace(options, global_batch=None, exhaustive=True)

    def ranked(number: int) -> Sequence[Candidate]:
        try:
            return search(config, cluster_of(gpu, number, None, interconnect), everything).ranked
        except EverestError:  # the global batch cannot be split over so many ranks
            return []

    rows = []
    with progress_of("what if", len(NUMBERS)) as on_progress:
        for done, number in enumerate(NUMBERS, 1):
            rows += ask_what_if(ranked, [number])
            on_progress(done)
    if not rows:
        raise UsageError("--what-if: no candidate fits on any of 1 to 1,024 GPUs", given=gpu)
    batch = config.batch.global_batch_size
    return f"{config.model.backbone}, {config.task}, {batch} clips per step, on {gpu}", rows
