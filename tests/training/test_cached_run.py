"""Tests of runs that read a token cache: bit-equal to runs that decode, also when one resumes the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from everest_ds.config import Experiment
from everest_ds.data.store.fill_cache import CacheFiller
from everest_ds.training.run_folder import RunFolder
from everest_ds.training.samples import read_training_samples
from everest_ds.training.token_packing import Packer
from tests.ranks import run_ranks
from tests.training.runs import experiment, losses, train_rank


def run(data: Path, folder: Path, cache: Path | None, /, **sections: dict[str, Any]) -> Experiment:
    """Return a run that cycles through two draws, in three epochs, and reads `cache` if it is given."""
    ours = {"draws": 2, "train_crop": "multi_scale", "token_cache": cache}
    return experiment(data, folder, tokens={"score": "pixel"}, data=ours, **sections)


def fill_cache(config: Experiment) -> None:
    """Fill the token cache of a run, as `everest-ds data cache` does."""
    assert config.data.token_cache is not None
    samples = read_training_samples(config, RunFolder(config.run.dir).excluded).samples
    filler = CacheFiller(config, samples, Packer(config), config.data.token_cache)
    filler.fill(lambda done: None)
    filler.finish()


@pytest.mark.slow  # half a minute on a busy machine
def test_two_ranks_on_a_cache_train_as_two_that_decode_and_may_be_stopped_between(
    motion_data: Path, tmp_path: Path
) -> None:
    fill_cache(run(motion_data, tmp_path / "decoded", tmp_path / "cache"))
    run_ranks(train_rank, 2, run(motion_data, tmp_path / "decoded", None))
    # The first steps decode, and the rest of the second epoch and the third read the cache.
    both = tmp_path / "both"
    for cache, steps in ((None, 4), (tmp_path / "cache", None)):
        run_ranks(train_rank, 2, run(motion_data, both, cache, run={"dir": str(both), "max_steps": steps}))
    assert losses(both) == losses(tmp_path / "decoded")
    assert len(losses(both)) == 9
