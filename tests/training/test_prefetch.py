"""Tests of prefetching: losses, errors and reports are the same as without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from everest_ds.config import Experiment
from everest_ds.data.clip_batches import ClipBatch
from everest_ds.data.clip_source import LoadedItem
from everest_ds.data.clips import TrainingClips
from everest_ds.data.order import Visit, epoch_order
from everest_ds.data.reading import Failure
from everest_ds.errors import DataError
from everest_ds.parallel.world import World
from everest_ds.training.loop import train
from everest_ds.training.prefetch import Prefetcher
from tests.ranks import run_ranks
from tests.training.faults import outcome, replaced
from tests.training.runs import experiment, losses, metrics, train_rank

CPU = torch.device("cpu")


def numbered(number: int, clip: torch.Tensor) -> ClipBatch:
    return ClipBatch(clip, torch.tensor([0]), torch.tensor([number]), torch.tensor([number]))


class Stream:
    """A stream of batches 0, 1, ... with a failed sample in each; batches in `broken` raise an error."""

    def __init__(self, broken: set[int]) -> None:
        self.broken = broken
        self.taken = 0
        self.failures: list[Failure] = []

    def __iter__(self) -> Iterator[ClipBatch]:
        return self

    def __next__(self) -> ClipBatch:
        number, self.taken = self.taken, self.taken + 1
        if number in self.broken:
            raise DataError(f"batch {number}")
        self.failures.append(Failure(0, number, number, "", True))
        return numbered(number, torch.tensor([number]))


@given(
    num_batches=st.integers(1, 12),
    fetched=st.lists(st.booleans(), min_size=12, max_size=12),
    broken=st.sets(st.integers(0, 11), max_size=2),
    breaks_device=st.booleans(),
)
def test_each_take_gives_its_own_batch_error_and_failures(
    num_batches: int, fetched: list[bool], broken: set[int], breaks_device: bool
) -> None:
    """Errors arrive with their own batch, with or without `fetch`, from the loader and from `prepare`."""
    stream, noted = Stream(set() if breaks_device else broken), list[int]()

    def prepare(batch: Any) -> Any:
        if breaks_device and int(batch.item) in broken:
            raise DataError(f"batch {int(batch.item)}")
        return batch._replace(clip=batch.clip * 10)

    def on_failure(failure: Failure) -> None:
        noted.append(failure.sample)

    ahead = Prefetcher(stream, num_batches, stream.failures, on_failure, prepare, CPU)
    for step in range(num_batches):
        if step in broken:
            with pytest.raises(DataError, match=f"batch {step}$"):
                ahead.take()
        else:
            ready = ahead.take()
            assert ready.items.tolist() == [step] and ready.batch.clip.tolist() == [10 * step]
        assert noted == [n for n in range(step + 1) if breaks_device or n not in broken]
        assert stream.taken == step + 1
        if fetched[step]:
            ahead.fetch()
            assert stream.taken == min(step + 2, num_batches)


def train_without_prefetching(world: World, config: Experiment) -> None:
    """Train with a `fetch` that does nothing, so that each step reads its own batch."""
    with replaced(Prefetcher, "fetch", lambda fetch: lambda prefetcher: None):
        train(config, world)


def test_losses_and_failures_are_those_of_a_run_that_fetches_nothing(
    motion_data: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    lines = (motion_data / "train.txt").read_text().splitlines()
    lines[epoch_order(0, 1, 24)[9]] = f"{broken} 0"  # read in the second step of the second epoch

    def config(name: str) -> Experiment:
        manifest = tmp_path / f"{name}.txt"  # one manifest per run, so that each has its own ledger
        manifest.write_text("".join(f"{motion_data / line}\n" for line in lines))
        return experiment(
            motion_data,
            tmp_path / name,
            "finetune",
            data={"train": str(manifest), "num_workers": 1, "max_broken_pct": 10},
            augment={"rand_augment_ops": 2, "erase_probability": 0.5, "mixup_alpha": 0.8},
            batch={"micro_batch_size": 2, "global_batch_size": 8},  # two ranks, two micro-batches
        )

    run_ranks(train_rank, 2, config("ahead"))
    run_ranks(train_without_prefetching, 2, config("plain"))
    ahead, plain = ([row for row in metrics(tmp_path / name) if "loss" in row] for name in ("ahead", "plain"))
    assert len(ahead) == 9 and losses(tmp_path / "ahead") == losses(tmp_path / "plain")
    assert [row["replaced_videos"] for row in ahead] == [row["replaced_videos"] for row in plain]
    assert (tmp_path / "ahead/broken.jsonl").read_text() == (tmp_path / "plain/broken.jsonl").read_text()


def fail_in_epoch_1(world: World, config: Experiment) -> str:
    """Train with a loader of rank 1 that fails at its first sample of the second epoch."""

    def make(read: Any) -> Any:
        def getitem(clips: TrainingClips, visit: Visit) -> LoadedItem:
            if visit.epoch == 1 and world.rank == 1:
                raise RuntimeError("simulated failure")
            return read(clips, visit)

        return getitem

    with replaced(TrainingClips, "__getitem__", make):
        return outcome(world, config)


@pytest.mark.parametrize(("workers", "tensor"), [(0, 1), (2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_an_error_ends_all_ranks_at_the_step_of_its_batch(
    motion_data: Path, tmp_path: Path, workers: int, tensor: int
) -> None:
    config = experiment(
        motion_data,
        tmp_path,
        data={"num_workers": workers},
        parallelism={"tensor": tensor},
        run={"save_every_steps": 3},
    )
    messages = run_ranks(fail_in_epoch_1, 2, config)
    assert messages[0] == messages[1] and "given: RuntimeError: simulated failure" in messages[0]
    assert list(losses(tmp_path)) == [1, 2, 3]  # the first epoch is complete
    assert (tmp_path / "checkpoints" / "step-00000003").is_dir()
